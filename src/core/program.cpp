#include "program.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <stdexcept>
#include <utility>

#include "dispatch.h"

namespace smolrun {
namespace {

// No real model comes near; products of a few of them fit 63 bits.
constexpr int64_t kLargestDimension = int64_t{1} << 24;

std::string shape(int64_t rows, int64_t columns) {
    std::string text = "(";
    text += std::to_string(rows) + ", " + std::to_string(columns) + ")";
    return text;
}

void check_range(const char* name, int64_t value, int64_t least, int64_t most) {
    if (value >= least && value <= most) return;
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + "; expected " +
                                std::to_string(least) + " to " + std::to_string(most));
}

void check_dimensions(const ProgramSpec& spec) {
    const Dimensions& d = spec.dimensions;
    check_range("num_attention_heads", d.num_attention_heads, 1, 1 << 16);
    check_range("num_key_value_heads", d.num_key_value_heads, 1, d.num_attention_heads);
    check_range("head_dim", d.head_dim, 2, 1024);
    check_range("num_hidden_layers", d.num_hidden_layers, 1, 1 << 16);
    check_range("vocab_size", d.vocab_size, 1, kLargestDimension);
    check_range("max_step_tokens", d.max_step_tokens, 1, 1 << 16);
    check_threads(d.threads);
    if (d.head_dim % 2 != 0) {
        throw std::invalid_argument("head_dim is " + std::to_string(d.head_dim) +
                                    "; expected an even number");
    }
    if (d.num_attention_heads % d.num_key_value_heads != 0) {
        throw std::invalid_argument("num_attention_heads is " +
                                    std::to_string(d.num_attention_heads) +
                                    "; expected a multiple of num_key_value_heads, " +
                                    std::to_string(d.num_key_value_heads));
    }
    if (d.head_rows() > kProductFloats) {
        throw std::invalid_argument("head_dim is " + std::to_string(d.head_dim) +
                                    "; heads of this size are not supported");
    }
    if (static_cast<int64_t>(spec.inverse_frequencies.size()) != d.head_dim / 2) {
        throw std::invalid_argument(
            "inverse_frequencies has " + std::to_string(spec.inverse_frequencies.size()) +
            " values; expected head_dim / 2, " + std::to_string(d.head_dim / 2));
    }
    const auto finite = [](float value) { return std::isfinite(value); };
    if (!finite(spec.attention_factor) ||
        !std::all_of(spec.inverse_frequencies.begin(), spec.inverse_frequencies.end(), finite)) {
        throw std::invalid_argument("attention_factor, inverse_frequencies: not finite");
    }
    if (spec.activations != "exact" && spec.activations != "fast") {
        throw std::invalid_argument("activations is '" + spec.activations +
                                    "'; expected 'exact' or 'fast'");
    }
    for (const auto& [name, width] : spec.buffers) {
        check_range(("buffer '" + name + "'").c_str(), width, 1, kLargestDimension);
    }
}

// Lays all scratch out from `base`; with a null base only the size is of use. Returns the size.
size_t place_scratch(const ProgramSpec& spec, const Dimensions& d, int64_t columns, std::byte* base,
                     Scratch& scratch, std::map<std::string, Buffer>& buffers) {
    Layout layout(base);
    const bool fast = spec.activations == "fast";
    const int64_t parts = (columns + kCodePartColumns - 1) / kCodePartColumns;
    const auto input = [&](int64_t tokens) {
        return InputScratch{columns,
                            layout.array<float>(tokens * columns),
                            layout.array<WordPiece>(tokens * (columns / 32 + 1)),
                            layout.array<WordScale>(tokens * (columns / 32 + 1)),
                            fast ? layout.array<BytePiece>(tokens * (columns / 32 + 1)) : nullptr,
                            fast ? layout.array<float>(tokens) : nullptr,
                            layout.array<int16_t>(tokens * parts * kCodePartColumns),
                            layout.array<float>(tokens * parts * kCodePartRuns),
                            tokens};
    };
    for (const auto& [name, width] : spec.buffers) {
        buffers[name] = {layout.array<float>(d.max_step_tokens * width), width};
    }
    scratch.input = input(d.max_step_tokens + kPanelTokens);  // the last panel may not be full
    scratch.partials =
        layout.array<float>(kMostSegments * d.num_attention_heads * (d.head_dim + kPartialExtra));
    scratch.cosine = layout.array<float>(d.max_step_tokens * (d.head_dim / 2));
    scratch.sine = layout.array<float>(d.max_step_tokens * (d.head_dim / 2));
    scratch.threads.clear();
    for (int i = 0; i < d.threads; ++i) {
        ThreadScratch own{};
        own.input = input(1);
        own.products = layout.array<float>(2 * kProductFloats);
        own.attention = layout.array<float>(attention_scratch(d.group(), d.head_dim));
        own.linear = layout.array<std::byte>(kLinearScratch);
        scratch.threads.push_back(own);
    }
    return layout.bytes();
}

// Products whose inputs keep 16 bits where activations are fast: rounding them costs most, and they
// are a small part of the work (docs/decisions.md).
bool stays_exact(const std::string& kind, const std::string& field) {
    return kind == "norm_logits" || (kind == "norm_qkv" && field == "v");
}

// Whether it is a layer's, with weights of F16.
bool has_f16(const Operation& operation) {
    const auto is_f16 = [](const auto&... matrices) {
        return ((matrices.weights.type == WeightType::F16) || ...);
    };
    return std::visit(
        [&](const auto& op) {
            if constexpr (requires { op.q; }) return is_f16(op.q, op.k, op.v);
            if constexpr (requires { op.gate; }) return is_f16(op.gate, op.up);
            if constexpr (requires {
                              op.matrix;
                              op.out;
                          })
                return is_f16(op.matrix);
            return false;
        },
        operation);
}

// Links one operation after the other, remembering which buffers have been written.
class Linker {
  public:
    Linker(const ProgramSpec& spec, const Kernels& kernels,
           const std::map<std::string, Buffer>& buffers)
        : spec_(spec), dimensions_(spec.dimensions), kernels_(kernels), buffers_(buffers) {}

    std::vector<Operation> link() {
        std::vector<Operation> linked;
        for (index_ = 0; index_ < spec_.operations.size(); ++index_) {
            linked.push_back(link_one());
        }
        if (!has_logits_) {
            throw std::invalid_argument(
                "the program has no norm_logits: nothing would be computed");
        }
        return linked;
    }

    int64_t hidden_size() const { return hidden_size_; }

  private:
    const OperationSpec& operation() const { return spec_.operations[index_]; }

    [[noreturn]] void fail(const std::string& what) const {
        throw std::invalid_argument("operation " + std::to_string(index_) + " (" +
                                    operation().kind + "): " + what);
    }

    Operation link_one() {
        const std::string& kind = operation().kind;
        if (has_logits_) fail("nothing may follow norm_logits");
        if (kind == "embed") return checked(embed(), {"weight", "out"});
        if (kind == "norm_qkv") {
            return checked(norm_qkv(), {"input", "norm", "epsilon", "q", "k", "v", "q_bias",
                                        "k_bias", "v_bias", "rope", "layer", "out"});
        }
        if (kind == "attention") return checked(attention(), {"input", "layer", "out"});
        if (kind == "linear_add") {
            return checked(linear_add(), {"input", "weight", "bias", "out"});
        }
        if (kind == "norm_swiglu") {
            return checked(norm_swiglu(), {"input", "norm", "epsilon", "gate", "up", "gate_bias",
                                           "up_bias", "out"});
        }
        if (kind == "norm_logits") {
            return checked(norm_logits(), {"input", "norm", "epsilon", "weight"});
        }
        fail("unknown kind");
    }

    // A field that no operation reads would be silently ignored.
    Operation checked(Operation linked, const std::set<std::string>& known) const {
        for (const auto& [name, value] : operation().fields) {
            if (known.count(name) == 0) fail("unknown field '" + name + "'");
        }
        return linked;
    }

    Embed embed() {
        const Matrix& weights = matrix("weight", dimensions_.vocab_size, kAnySize);
        const Buffer out = output("out", weights.columns);
        return {weights, kernels_.dequantize[static_cast<int>(weights.type)], out};
    }

    NormQkv norm_qkv() {
        NormQkv op{};
        op.input = normalized_input();
        const int64_t width = op.input.buffer.width;
        const int64_t q_rows = dimensions_.num_attention_heads * dimensions_.head_dim;
        const int64_t kv_rows = dimensions_.num_key_value_heads * dimensions_.head_dim;
        op.q = linked("q", "q_bias", q_rows, width, op.input);
        op.k = linked("k", "k_bias", kv_rows, width, op.input);
        op.v = linked("v", "v_bias", kv_rows, width, op.input);
        op.rope = field<bool>("rope", "true or false");
        op.layer = layer();
        if (!written_layers_.insert(op.layer).second) {
            fail("layer " + std::to_string(op.layer) + " is written a second time");
        }
        op.out = output("out", q_rows);
        return op;
    }

    Attention attention() {
        Attention op{};
        op.input = input("input");
        const int64_t width = dimensions_.num_attention_heads * dimensions_.head_dim;
        if (op.input.width != width) {
            fail("buffer 'input' is " + std::to_string(op.input.width) +
                 " wide; expected num_attention_heads * head_dim, " + std::to_string(width));
        }
        op.layer = layer();
        if (written_layers_.count(op.layer) == 0) {
            fail("layer " + std::to_string(op.layer) + " has no norm_qkv before it");
        }
        op.out = output("out", width);
        return op;
    }

    LinearAdd linear_add() {
        LinearAdd op{};
        op.input.buffer = input("input");
        const std::string& out = text("out");
        if (written_buffers_.count(out) == 0) {
            fail("buffer '" + out + "' is added to before anything is written to it");
        }
        op.matrix = linked("weight", "bias", kAnySize, op.input.buffer.width, op.input);
        op.out = output("out", op.matrix.weights.rows);
        return op;
    }

    NormSwiglu norm_swiglu() {
        NormSwiglu op{};
        op.input = normalized_input();
        const int64_t width = op.input.buffer.width;
        op.gate = linked("gate", "gate_bias", kAnySize, width, op.input);
        op.up = linked("up", "up_bias", op.gate.weights.rows, width, op.input);
        op.out = output("out", op.gate.weights.rows);
        return op;
    }

    NormLogits norm_logits() {
        NormLogits op{};
        op.input = normalized_input();
        hidden_size_ = op.input.buffer.width;
        op.matrix = linked("weight", "", dimensions_.vocab_size, hidden_size_, op.input);
        op.input.floats = true;  // a caller may want them
        has_logits_ = true;
        return op;
    }

    // --- fields

    static constexpr int64_t kAnySize = -1;

    const OperationSpec::Value& value(const std::string& name) const {
        static const OperationSpec::Value none;
        const auto found = operation().fields.find(name);
        return found == operation().fields.end() ? none : found->second;
    }

    template <class T>
    const T& field(const std::string& name, const char* expected) const {
        const T* const found = std::get_if<T>(&value(name));
        if (found == nullptr) fail("field '" + name + "': expected " + expected);
        return *found;
    }

    const std::string& text(const std::string& name) const {
        return field<std::string>(name, "a name");
    }

    int64_t layer() const {
        const int64_t layer = field<int64_t>("layer", "a whole number");
        if (layer < 0 || layer >= dimensions_.num_hidden_layers) {
            fail("layer is " + std::to_string(layer) + "; expected 0 to " +
                 std::to_string(dimensions_.num_hidden_layers - 1));
        }
        return layer;
    }

    float epsilon() const {
        const double epsilon = field<double>("epsilon", "a number");
        if (!(epsilon >= 0 && epsilon < 1)) fail("epsilon: expected 0 <= epsilon < 1");
        return static_cast<float>(epsilon);
    }

    const Buffer& buffer(const std::string& field_name) const {
        const std::string& name = text(field_name);
        const auto found = buffers_.find(name);
        if (found == buffers_.end()) fail("there is no buffer '" + name + "'");
        return found->second;
    }

    const Buffer& input(const std::string& field_name) const {
        const Buffer& found = buffer(field_name);
        if (written_buffers_.count(text(field_name)) == 0) {
            fail("buffer '" + text(field_name) + "' is read before anything is written to it");
        }
        return found;
    }

    const Buffer& output(const std::string& field_name, int64_t width) {
        const Buffer& found = buffer(field_name);
        const std::string& name = text(field_name);
        if (found.width != width) {
            fail("buffer '" + name + "' is " + std::to_string(found.width) +
                 " wide; the result is " + std::to_string(width));
        }
        // Chunks of the result would be written while others still read the input.
        const auto* const read = std::get_if<std::string>(&value("input"));
        if (read != nullptr && *read == name) fail("input and out are both '" + name + "'");
        written_buffers_.insert(name);
        return found;
    }

    const Matrix& matrix(const std::string& field_name, int64_t rows, int64_t columns) const {
        const std::string& name = text(field_name);
        const auto found = spec_.matrices.find(name);
        if (found == spec_.matrices.end()) {
            fail(spec_.vectors.count(name) != 0
                     ? "weight '" + name + "' is an array; expected a Weight"
                     : "weight '" + name + "' is missing");
        }
        const Matrix& weights = found->second->matrix();
        if ((rows != kAnySize && weights.rows != rows) ||
            (columns != kAnySize && weights.columns != columns)) {
            fail("weight '" + name + "' has shape " + shape(weights.rows, weights.columns) +
                 "; expected " +
                 shape(rows == kAnySize ? weights.rows : rows,
                       columns == kAnySize ? weights.columns : columns));
        }
        return weights;
    }

    const float* vector(const std::string& name, int64_t width) const {
        const auto found = spec_.vectors.find(name);
        if (found == spec_.vectors.end()) {
            fail(spec_.matrices.count(name) != 0
                     ? "weight '" + name + "' is a Weight; expected a float32 array"
                     : "weight '" + name + "' is missing");
        }
        if (static_cast<int64_t>(found->second.size()) != width) {
            fail("weight '" + name + "' has " + std::to_string(found->second.size()) +
                 " values; expected " + std::to_string(width));
        }
        return found->second.data();
    }

    LinkedInput normalized_input() const {
        LinkedInput linked{};
        linked.buffer = input("input");
        linked.norm = vector(text("norm"), linked.buffer.width);
        linked.epsilon = epsilon();
        return linked;
    }

    LinkedMatrix linked(const std::string& field_name, const std::string& bias_name, int64_t rows,
                        int64_t columns, LinkedInput& read_from) const {
        const Matrix& weights = matrix(field_name, rows, columns);
        read_from.operation = index_;
        const auto type = static_cast<size_t>(weights.type);
        const bool fast = spec_.activations == "fast" && kernels_.fast_linear[type] != nullptr &&
                          !stays_exact(operation().kind, field_name);
        if (!is_float(weights.type)) {
            (fast ? read_from.quantize_bytes : read_from.quantize) = true;
        } else if (weights.type == WeightType::I16) {
            read_from.quantize_runs = true;
        } else {
            read_from.floats = true;
        }
        const bool has_bias =
            !bias_name.empty() && !std::holds_alternative<std::monostate>(value(bias_name));
        const float* const bias = has_bias ? vector(text(bias_name), weights.rows) : nullptr;
        return {weights, fast ? kernels_.fast_linear[type] : kernels_.linear[type], bias};
    }

    const ProgramSpec& spec_;
    const Dimensions& dimensions_;
    const Kernels& kernels_;
    const std::map<std::string, Buffer>& buffers_;
    size_t index_ = 0;
    std::set<std::string> written_buffers_;
    std::set<int64_t> written_layers_;
    bool has_logits_ = false;
    int64_t hidden_size_ = 0;
};

}  // namespace

Program::Program(ProgramSpec spec)
    : spec_(std::move(spec)), dimensions_(spec_.dimensions), kernels_(kernels_of(spec_.isa)) {
    check_dimensions(spec_);
    link();
}

void Program::link() {
    // Widest input of a product: some buffer.
    int64_t columns = 0;
    for (const auto& [name, width] : spec_.buffers) columns = std::max(columns, width);

    Scratch scratch;
    std::map<std::string, Buffer> buffers;
    const size_t bytes = place_scratch(spec_, dimensions_, columns, nullptr, scratch, buffers);
    AnonymousMemory memory(bytes);
    place_scratch(spec_, dimensions_, columns, memory.data(), scratch, buffers);

    Linker linker(spec_, kernels_, buffers);
    operations_ = linker.link();
    last_norm_qkv_ = operations_.size();
    multiplies_f16_ = std::any_of(operations_.begin(), operations_.end(), has_f16);
    for (size_t i = 0; i < operations_.size(); ++i) {
        if (std::holds_alternative<NormQkv>(operations_[i])) last_norm_qkv_ = i;
    }
    buffers_.clear();
    for (const auto& [name, buffer] : buffers) buffers_.push_back(buffer);
    hidden_size_ = linker.hidden_size();
    scratch_ = std::move(scratch);
    memory_ = std::move(memory);
}

void check_threads(int threads) { check_range("threads", threads, 1, 1024); }

void Program::set_threads(int threads) {
    const int before = std::exchange(dimensions_.threads, threads);
    try {
        link();
    } catch (...) {
        dimensions_.threads = before;
        throw;
    }
}

// As transformers computes them, where the angle is a float32 product.
void Program::set_positions(const int32_t* positions, int64_t tokens) const {
    const int64_t half = dimensions_.head_dim / 2;
    const double factor = static_cast<double>(spec_.attention_factor);
    for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t i = 0; i < half; ++i) {
            const float angle = static_cast<float>(positions[token]) *
                                spec_.inverse_frequencies[static_cast<size_t>(i)];
            const double exact = static_cast<double>(angle);
            scratch_.cosine[token * half + i] = static_cast<float>(std::cos(exact) * factor);
            scratch_.sine[token * half + i] = static_cast<float>(std::sin(exact) * factor);
        }
    }
}

}  // namespace smolrun
