// Weight, Packing and Runner as Python sees them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "python_arrays.h"
#include "runner.h"
#include "weight.h"

namespace nb = nanobind;

namespace smolrun {
namespace {

WeightType weight_type_of(const std::string& name) {
    for (int i = 0; i < kFileTypes; ++i) {
        if (name == kBlockLayouts[i].name) return static_cast<WeightType>(i);
    }
    throw std::invalid_argument("type: '" + name + "' is not a weight type");
}

// A Weight that keeps the array it reads until it is packed.
class PythonWeight {
  public:
    // Packed by `pack`, or as one of the items of a Packing.
    PythonWeight(const std::string& type, int64_t rows, int64_t columns, nb::handle data,
                 int64_t interleaved_head_dim, bool drop_source, bool consume_source, bool as_codes,
                 const FileMappings& files)
        : source_(std::in_place, data, "data", Element::uint8, 1) {
        if (drop_source && !source_->readonly()) {
            throw std::invalid_argument("data: drop_source needs a read-only view of a file");
        }
        if (consume_source && source_->readonly()) {
            throw std::invalid_argument("data: consume_source needs a writable array");
        }
        const FileRows source{weight_type_of(type), rows,    columns, source_->data<std::byte>(),
                              interleaved_head_dim, as_codes};
        const int64_t bytes = source_->bytes();
        weight_.emplace(source, bytes);
        if (drop_source) release_.file = files.around(source.data, static_cast<size_t>(bytes));
        release_.consumed = consume_source;
    }

    // Packs it on this thread.
    void pack() {
        {
            const GilReleased released;
            for (int64_t chunk = 0; chunk < weight_->chunks(); ++chunk) {
                weight_->pack(chunk, release_);
            }
        }
        packed();
    }
    Packing::Item item() { return {&*weight_, release_}; }
    // Tells that all of it is packed, so that the source is not needed any more.
    void packed() { source_.reset(); }

    const Weight& weight() const { return *weight_; }

  private:
    std::optional<Array> source_;
    std::optional<Weight> weight_;
    SourceRelease release_;
};

// Weights on their way, and the sources that they are packed from.
class PythonPacking {
  public:
    PythonPacking(const nb::list& sources, bool as_codes) {
        const FileMappings files;
        std::vector<Packing::Item> items;
        for (const nb::handle source : sources) {
            const auto [type, rows, columns, data, interleaved_head_dim, drop_source,
                        consume_source] =
                nb::cast<
                    std::tuple<std::string, int64_t, int64_t, nb::object, int64_t, bool, bool>>(
                    source);
            weights_.push_back(std::make_unique<PythonWeight>(type, rows, columns, data,
                                                              interleaved_head_dim, drop_source,
                                                              consume_source, as_codes, files));
            items.push_back(weights_.back()->item());
        }
        packing_.emplace(std::move(items));
    }

    bool work(int64_t chunks) {
        const GilReleased released;
        return packing_->work(chunks);
    }
    void stop() { packing_->stop(); }
    int64_t bytes_done() const { return packing_->bytes_done(); }

    nb::list weights() {
        if (!packing_->done()) throw std::runtime_error("not all weights are packed");
        nb::list result;
        for (std::unique_ptr<PythonWeight>& weight : weights_) {
            weight->packed();
            result.append(nb::cast(std::move(weight)));
        }
        weights_.clear();  // `packing_` has nothing left to do with them
        return result;
    }

  private:
    std::vector<std::unique_ptr<PythonWeight>> weights_;
    std::optional<Packing> packing_;
};

OperationSpec::Value field_value(const std::string& name, nb::handle value) {
    if (value.is_none()) return std::monostate{};
    if (PyBool_Check(value.ptr())) return nb::cast<bool>(value);
    if (nb::isinstance<nb::int_>(value)) return nb::cast<int64_t>(value);
    if (nb::isinstance<nb::float_>(value)) return nb::cast<double>(value);
    if (nb::isinstance<nb::str>(value)) return nb::cast<std::string>(value);
    throw nb::type_error(
        ("operations: field '" + name + "' must be a str, int, float, bool or None").c_str());
}

std::vector<OperationSpec> read_operations(const nb::list& operations) {
    std::vector<OperationSpec> specs;
    for (const nb::handle operation : operations) {
        OperationSpec spec;
        for (const auto& [key, value] : nb::cast<nb::dict>(operation)) {
            const std::string name = nb::cast<std::string>(key);
            if (name == "kind") {
                spec.kind = nb::cast<std::string>(value);
            } else {
                spec.fields[name] = field_value(name, value);
            }
        }
        specs.push_back(std::move(spec));
    }
    return specs;
}

std::vector<float> read_vector(nb::handle object, const char* name) {
    const Array array(object, name, Element::float32, 1);
    return {array.data<float>(), array.data<float>() + array.size(0)};
}

// A Runner that keeps the weights it computes with.
class PythonRunner {
  public:
    PythonRunner(const nb::list& operations, const nb::dict& weights, const nb::dict& buffers,
                 int64_t num_attention_heads, int64_t num_key_value_heads, int64_t head_dim,
                 int64_t num_hidden_layers, int64_t vocab_size, nb::handle inverse_frequencies,
                 double attention_factor, int64_t kv_blocks, int64_t max_step_tokens, int threads,
                 const std::string& isa, const std::string& activations) {
        ProgramSpec spec;
        spec.operations = read_operations(operations);
        for (const auto& [key, value] : weights) {
            const std::string name = nb::cast<std::string>(key);
            if (nb::isinstance<PythonWeight>(value)) {
                spec.matrices[name] = &nb::cast<const PythonWeight&>(value).weight();
                weights_.push_back(nb::borrow(value));
            } else {
                spec.vectors[name] = read_vector(value, name.c_str());
            }
        }
        for (const auto& [key, value] : buffers) {
            spec.buffers[nb::cast<std::string>(key)] = nb::cast<int64_t>(value);
        }
        spec.inverse_frequencies = read_vector(inverse_frequencies, "inverse_frequencies");
        spec.attention_factor = static_cast<float>(attention_factor);
        spec.dimensions = {num_attention_heads, num_key_value_heads, head_dim, num_hidden_layers,
                           vocab_size,          max_step_tokens,     threads};
        spec.isa = isa;
        spec.activations = activations;
        runner_.emplace(std::move(spec), kv_blocks);
    }

    void step(nb::handle tokens, nb::handle positions, nb::handle sequences,
              nb::handle block_tables, nb::handle logit_rows, nb::handle logits,
              nb::handle hidden) {
        const Array token_ids(tokens, "tokens", Element::int32, 1);
        const Array position_array(positions, "positions", Element::int32, 1);
        const Array sequence_array(sequences, "sequences", Element::int32, 1);
        const Array tables(block_tables, "block_tables", Element::int32, 2);
        const Array rows(logit_rows, "logit_rows", Element::int32, 1);
        std::optional<Array> logit_array, hidden_array;
        if (!logits.is_none()) logit_array.emplace(logits, "logits", Element::float32, 2, true);
        if (!hidden.is_none()) hidden_array.emplace(hidden, "hidden", Element::float32, 2, true);

        const int64_t n = token_ids.size(0);
        position_array.expect_shape({n});
        sequence_array.expect_shape({n});
        const Program& program = runner_->program();
        if (logit_array) {
            logit_array->expect_shape({rows.size(0), program.dimensions().vocab_size});
        }
        if (hidden_array) hidden_array->expect_shape({rows.size(0), program.hidden_size()});

        const Runner::Use use(*runner_);
        runner_->prepare({n, token_ids.data<int32_t>(), position_array.data<int32_t>(),
                          sequence_array.data<int32_t>(), tables.size(0), tables.size(1),
                          tables.data<int32_t>(), rows.size(0), rows.data<int32_t>(),
                          logit_array ? logit_array->data<float>() : nullptr,
                          hidden_array ? hidden_array->data<float>() : nullptr});
        const GilReleased released;
        runner_->run();
    }

    void zero_blocks(nb::handle blocks) {
        const Array array(blocks, "blocks", Element::int32, 1);
        const Runner::Use use(*runner_);
        runner_->zero_blocks(array.data<int32_t>(), array.size(0));
    }

    void release_blocks(nb::handle blocks) {
        const Array array(blocks, "blocks", Element::int32, 1);
        const Runner::Use use(*runner_);
        runner_->release_blocks(array.data<int32_t>(), array.size(0));
    }

    void set_threads(int threads) {
        const Runner::Use use(*runner_);
        runner_->set_threads(threads);
    }

    void set_profiling(bool on) {
        const Runner::Use use(*runner_);
        runner_->set_profiling(on);
    }

    nb::dict profile() {
        const Runner::Use use(*runner_);
        nb::dict result;
        result["nanoseconds"] = runner_->profile().nanoseconds();
        result["ends"] = runner_->profile().ends();
        return result;
    }

    void collect_squares(bool on) {
        const Runner::Use use(*runner_);
        runner_->collect_squares(on);
    }

    std::vector<std::vector<double>> squares() {
        const Runner::Use use(*runner_);
        return runner_->squares();
    }

    int threads() const { return runner_->threads(); }
    std::string isa() const { return runner_->program().kernels().name; }
    int64_t kv_block_bytes() const { return runner_->kv().block_bytes(); }

    nb::dict memory() const {
        int64_t packed = 0;
        for (const nb::object& weight : weights_) {
            packed += nb::cast<const PythonWeight&>(weight).weight().packed_bytes();
        }
        nb::dict result;
        result["packed_weights"] = packed;
        result["kv_cache"] = runner_->kv().bytes();
        result["scratch"] = runner_->program().scratch_bytes();
        return result;
    }

  private:
    std::vector<nb::object> weights_;
    std::optional<Runner> runner_;
};

}  // namespace

void bind_runner(nb::module_& module) {
    nb::class_<PythonWeight>(module, "Weight")
        .def(
            "__init__",
            [](PythonWeight* self, const std::string& type, int64_t rows, int64_t columns,
               nb::handle data, int64_t interleaved_head_dim, bool drop_source, bool consume_source,
               bool as_codes) {
                new (self) PythonWeight(type, rows, columns, data, interleaved_head_dim,
                                        drop_source, consume_source, as_codes, FileMappings());
                self->pack();
            },
            nb::arg("type"), nb::arg("rows"), nb::arg("columns"), nb::arg("data"),
            nb::arg("interleaved_head_dim") = 0, nb::arg("drop_source") = false,
            nb::arg("consume_source") = false, nb::arg("as_codes") = false)
        .def_prop_ro("type",
                     [](const PythonWeight& w) {
                         return std::string(layout(w.weight().source_type()).name);
                     })
        .def_prop_ro("rows", [](const PythonWeight& w) { return w.weight().matrix().rows; })
        .def_prop_ro("columns", [](const PythonWeight& w) { return w.weight().matrix().columns; })
        .def_prop_ro("nbytes", [](const PythonWeight& w) { return w.weight().packed_bytes(); });

    nb::class_<PythonPacking>(module, "Packing")
        .def(nb::init<const nb::list&, bool>(), nb::arg("sources"), nb::arg("as_codes") = false)
        .def("work", &PythonPacking::work, nb::arg("chunks"))
        .def("stop", &PythonPacking::stop)
        .def("weights", &PythonPacking::weights)
        .def_prop_ro("bytes_done", &PythonPacking::bytes_done);

    nb::class_<PythonRunner>(module, "Runner")
        .def(nb::init<const nb::list&, const nb::dict&, const nb::dict&, int64_t, int64_t, int64_t,
                      int64_t, int64_t, nb::handle, double, int64_t, int64_t, int,
                      const std::string&, const std::string&>(),
             nb::arg("operations"), nb::arg("weights"), nb::arg("buffers"), nb::kw_only(),
             nb::arg("num_attention_heads"), nb::arg("num_key_value_heads"), nb::arg("head_dim"),
             nb::arg("num_hidden_layers"), nb::arg("vocab_size"), nb::arg("inverse_frequencies"),
             nb::arg("attention_factor"), nb::arg("kv_blocks"), nb::arg("max_step_tokens") = 256,
             nb::arg("threads"), nb::arg("isa"), nb::arg("activations") = "exact")
        .def("step", &PythonRunner::step, nb::arg("tokens"), nb::arg("positions"),
             nb::arg("sequences"), nb::arg("block_tables"), nb::arg("logit_rows"),
             nb::arg("logits").none(), nb::arg("hidden") = nb::none())
        .def("zero_blocks", &PythonRunner::zero_blocks, nb::arg("blocks"))
        .def("release_blocks", &PythonRunner::release_blocks, nb::arg("blocks"))
        .def("set_threads", &PythonRunner::set_threads, nb::arg("threads"))
        .def("set_profiling", &PythonRunner::set_profiling, nb::arg("on"))
        .def("profile", &PythonRunner::profile)
        .def("collect_squares", &PythonRunner::collect_squares, nb::arg("on"))
        .def("squares", &PythonRunner::squares)
        .def_prop_ro("threads", &PythonRunner::threads)
        .def_prop_ro("isa", &PythonRunner::isa)
        .def_prop_ro("kv_block_bytes", &PythonRunner::kv_block_bytes)
        .def_prop_ro("memory", &PythonRunner::memory);
}

}  // namespace smolrun
