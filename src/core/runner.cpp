#include "runner.h"

#include <algorithm>
#include <cfenv>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace smolrun {
namespace {

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

std::string item(const char* array, int64_t index, int64_t value) {
    return std::string(array) + "[" + std::to_string(index) + "] is " + std::to_string(value);
}

void check_index(const char* array, int64_t index, int64_t value, int64_t limit,
                 const char* limit_name) {
    if (value >= 0 && value < limit) return;
    fail(item(array, index, value) + "; expected 0 to " + std::to_string(limit - 1) + ", below " +
         limit_name);
}

// Rounding mode and treatment of subnormal numbers as a thread starts with them: another library
// may have changed those of the calling thread, and results must not depend on who computes them.
class DefaultFloatingPoint {
  public:
    DefaultFloatingPoint() {
        std::fegetenv(&before_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloatingPoint() { std::fesetenv(&before_); }
    DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
    DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;

  private:
    std::fenv_t before_;
};

}  // namespace

Runner::Runner(ProgramSpec spec, int64_t kv_blocks)
    : program_(std::move(spec)),
      kv_((kv_blocks < 1 || kv_blocks > std::numeric_limits<int32_t>::max())
              ? throw std::invalid_argument("kv_blocks is " + std::to_string(kv_blocks) +
                                            "; expected 1 to 2147483647")
              : kv_blocks,
          program_.dimensions().num_hidden_layers, program_.dimensions().num_key_value_heads,
          program_.dimensions().head_dim) {
    team_ = std::make_unique<Team>(program_.dimensions().threads);
}

Runner::Use::Use(Runner& runner) : runner_(runner) {
    if (!runner.team_->alive()) {
        throw std::runtime_error(
            "this Runner belongs to the process that this one was forked from, and its threads "
            "stayed there; load the model after the fork");
    }
    if (runner.busy_.exchange(true, std::memory_order_acquire)) {
        throw std::runtime_error("a step of this Runner is under way; it runs one at a time");
    }
}

void Runner::prepare(const StepRequest& request) {
    const int64_t n = request.tokens;
    const int64_t most = program_.dimensions().max_step_tokens;
    if (n < 1 || n > most) {
        fail("tokens has " + std::to_string(n) + " values; a step takes 1 to " +
             std::to_string(most));
    }
    token_ids_.assign(request.token_ids, request.token_ids + n);
    positions_.assign(request.positions, request.positions + n);
    logit_rows_.assign(request.logit_rows, request.logit_rows + request.logit_row_count);
    StepRequest copied = request;
    copied.token_ids = token_ids_.data();
    copied.positions = positions_.data();
    copied.logit_rows = logit_rows_.data();
    std::vector<int32_t> sequences(request.sequences, request.sequences + n);
    copied.sequences = sequences.data();

    check_logit_rows(copied);
    last_positions_.assign(static_cast<size_t>(request.sequence_count), -1);
    check_tokens(copied);
    for (int64_t i = 0; i < n; ++i) {
        int64_t& last = last_positions_[static_cast<size_t>(sequences[static_cast<size_t>(i)])];
        const int64_t position = positions_[static_cast<size_t>(i)];
        if (last >= 0 && position != last + 1) {
            fail(item("positions", i, position) + "; the token before it in sequence " +
                 std::to_string(sequences[static_cast<size_t>(i)]) + " is at " +
                 std::to_string(last));
        }
        last = position;
    }
    copy_tables(copied);
    check_slots(copied);
    reorder(sequences);

    arrays_.tokens = n;
    arrays_.own = own_tokens(n);
    arrays_.token_ids = token_ids_.data();
    arrays_.positions = positions_.data();
    arrays_.block_tables.clear();
    for (const int32_t sequence : sequences) {
        arrays_.block_tables.push_back(tables_.data() +
                                       table_begins_[static_cast<size_t>(sequence)]);
    }
    arrays_.logit_row_count = request.logit_row_count;
    arrays_.logit_rows = logit_rows_.data();
    arrays_.logits = request.logits;
    arrays_.hidden = request.hidden;
    narrow();
}

// Where every thread can have many tokens, each keeps its own: then what it wrote is in its cache
// when it comes to be read, and it waits for others in attention only. (Not with weights of F16,
// which are converted once for more tokens; nor for squares, added up in the order of the tokens.)
int64_t Runner::own_tokens(int64_t tokens) const {
    constexpr int64_t kFewest = 96;
    if (tokens < threads() * kFewest || program_.multiplies_f16() || !squares_.empty()) {
        return tokens;
    }
    const int64_t panel = program_.kernels().panel_tokens;
    const int64_t panels = (tokens + threads() * panel - 1) / (threads() * panel);
    // The last thread may have fewer, but some.
    return panels * panel * (threads() - 1) < tokens ? panels * panel : tokens;
}

// Later tokens look at more of the cache: so each thread gets some of the first and some of the
// last.
void Runner::reorder(std::vector<int32_t>& sequences) {
    const int64_t tokens = static_cast<int64_t>(positions_.size());
    const int64_t own = own_tokens(tokens);
    if (own >= tokens) return;
    std::vector<int32_t> order;
    int64_t front = 0, back = tokens;
    while (front < back) {
        const int64_t count = std::min(own, back - front), first = count / 2;
        back -= count - first;
        for (int64_t i = 0; i < first; ++i) order.push_back(static_cast<int32_t>(front + i));
        for (int64_t i = first; i < count; ++i) {
            order.push_back(static_cast<int32_t>(back + i - first));
        }
        front += first;
    }
    const auto bring_in_order = [&](std::vector<int32_t>& values) {
        const std::vector<int32_t> before = values;
        for (size_t i = 0; i < order.size(); ++i) values[i] = before[static_cast<size_t>(order[i])];
    };
    bring_in_order(token_ids_);
    bring_in_order(positions_);
    bring_in_order(sequences);
    std::vector<int32_t> places(order.size());
    for (size_t i = 0; i < order.size(); ++i) {
        places[static_cast<size_t>(order[i])] = static_cast<int32_t>(i);
    }
    for (int32_t& row : logit_rows_) row = places[static_cast<size_t>(row)];
}

void Runner::narrow() {
    narrowed_tokens_ = logit_rows_;
    std::sort(narrowed_tokens_.begin(), narrowed_tokens_.end());
    narrowed_tokens_.erase(std::unique(narrowed_tokens_.begin(), narrowed_tokens_.end()),
                           narrowed_tokens_.end());
    narrowed_ = arrays_;
    narrowed_.tokens = static_cast<int64_t>(narrowed_tokens_.size());
    narrowed_.own = own_tokens(narrowed_.tokens);
    narrowed_.token_ids = nullptr;  // embedded before
    narrowed_.block_tables.clear();
    narrowed_positions_.clear();
    for (const int32_t token : narrowed_tokens_) {
        narrowed_positions_.push_back(positions_[static_cast<size_t>(token)]);
        narrowed_.block_tables.push_back(arrays_.block_tables[static_cast<size_t>(token)]);
    }
    narrowed_.positions = narrowed_positions_.data();
    narrowed_logit_rows_.clear();
    for (const int32_t row : logit_rows_) {
        const auto at = std::lower_bound(narrowed_tokens_.begin(), narrowed_tokens_.end(), row);
        narrowed_logit_rows_.push_back(static_cast<int32_t>(at - narrowed_tokens_.begin()));
    }
    narrowed_.logit_rows = narrowed_logit_rows_.data();
}

void Runner::check_tokens(const StepRequest& request) const {
    const int64_t context = request.blocks_per_sequence * kBlockTokens;
    for (int64_t i = 0; i < request.tokens; ++i) {
        check_index("tokens", i, request.token_ids[i], program_.dimensions().vocab_size,
                    "vocab_size");
        check_index("sequences", i, request.sequences[i], request.sequence_count,
                    "the rows of block_tables");
        check_index("positions", i, request.positions[i], context,
                    "the tokens that a row of block_tables holds");
    }
}

// Copies the entries that the step will read. Others may hold anything.
void Runner::copy_tables(const StepRequest& request) {
    tables_.clear();
    table_begins_.assign(static_cast<size_t>(request.sequence_count), 0);
    for (int64_t sequence = 0; sequence < request.sequence_count; ++sequence) {
        table_begins_[static_cast<size_t>(sequence)] = static_cast<int64_t>(tables_.size());
        const int64_t last = last_positions_[static_cast<size_t>(sequence)];
        if (last < 0) continue;
        const int32_t* const row = request.block_tables + sequence * request.blocks_per_sequence;
        const size_t begin = tables_.size();
        tables_.insert(tables_.end(), row, row + last / kBlockTokens + 1);
        for (size_t i = begin; i < tables_.size(); ++i) {
            const int64_t block = tables_[i];
            if (block >= 0 && block < kv_.blocks()) continue;
            fail("block_tables[" + std::to_string(sequence) + ", " + std::to_string(i - begin) +
                 "] is " + std::to_string(block) + "; expected 0 to " +
                 std::to_string(kv_.blocks() - 1) + ", below kv_blocks");
        }
    }
}

// Two tokens that wrote the same place would leave there whichever came last.
void Runner::check_slots(const StepRequest& request) {
    slots_.clear();
    for (int64_t i = 0; i < request.tokens; ++i) {
        const int64_t position = request.positions[i];
        const int64_t table = table_begins_[static_cast<size_t>(request.sequences[i])];
        const int64_t block = tables_[static_cast<size_t>(table + position / kBlockTokens)];
        slots_.push_back(block * kBlockTokens + position % kBlockTokens);
    }
    std::sort(slots_.begin(), slots_.end());
    const auto twice = std::adjacent_find(slots_.begin(), slots_.end());
    if (twice == slots_.end()) return;
    fail("block_tables: two tokens of this step would be stored in slot " +
         std::to_string(*twice % kBlockTokens) + " of block " +
         std::to_string(*twice / kBlockTokens));
}

void Runner::check_logit_rows(const StepRequest& request) const {
    for (int64_t i = 0; i < request.logit_row_count; ++i) {
        check_index("logit_rows", i, request.logit_rows[i], request.tokens, "the number of tokens");
    }
}

void Runner::run() {
    const DefaultFloatingPoint floating_point;
    program_.set_positions(arrays_.positions, arrays_.tokens);
    const auto context = [&](const StepArrays& arrays) {
        return StepContext{program_.dimensions(),
                           program_.kernels(),
                           program_.scratch(),
                           kv_,
                           arrays,
                           squares_.empty() ? nullptr : squares_.data()};
    };
    const StepContext step = context(arrays_), narrowed = context(narrowed_);
    if (!profiling_) {
        team_->run([&](Worker& worker) { run_operations(step, narrowed, worker, [](size_t) {}); });
        return;
    }
    profile_.start(team_->threads(), program_.operations().size());
    team_->run([&](Worker& worker) {
        int64_t before = 0;
        run_operations(step, narrowed, worker, [&](size_t operation) {
            const int64_t done = worker.chunks_done();
            if (done > before) profile_.finished(worker.index(), operation);
            before = done;
        });
    });
    profile_.stop();
}

// Calls finished(index) after each operation.
template <class Finished>
void Runner::run_operations(const StepContext& step, const StepContext& narrowed, Worker& worker,
                            Finished&& finished) {
    const std::vector<Operation>& operations = program_.operations();
    // All inputs count where their squares are wanted.
    const bool narrows = narrowed.arrays.tokens < step.arrays.tokens && step.squares == nullptr;
    const size_t last = narrows ? program_.last_norm_qkv() : operations.size();
    const auto run_one = [&](size_t i) {
        if (i == last) {
            run_narrowing(std::get<NormQkv>(operations[i]), {program_.buffers(), narrowed_tokens_},
                          step, narrowed, worker);
        } else if (i < last || narrowed.arrays.tokens > 0) {
            run_operation(operations[i], i < last ? step : narrowed, worker);
        }
        finished(i);
    };
    // Attention begins a chain, as it reads what others left; and logits may be of any tokens.
    const auto goes_on = [&](size_t i) {
        return i < operations.size() && i != last &&
               !std::holds_alternative<Attention>(operations[i]) &&
               !std::holds_alternative<NormLogits>(operations[i]);
    };
    size_t i = 0;
    while (i < operations.size()) {
        const StepArrays& arrays = (i < last ? step : narrowed).arrays;
        size_t end = i + 1;
        if (arrays.own < arrays.tokens &&
            (goes_on(i) || std::holds_alternative<Attention>(operations[i]))) {
            while (goes_on(end)) ++end;
            worker.chain([&] {
                for (size_t of_chain = i; of_chain < end; ++of_chain) run_one(of_chain);
            });
        } else {
            run_one(i);
        }
        i = end;
    }
}

void Runner::collect_squares(bool on) {
    squares_.clear();
    if (!on) return;
    for (const Operation& operation : program_.operations()) {
        const int64_t columns = std::visit(
            [](const auto& op) -> int64_t {
                if constexpr (requires { op.input.operation; }) return op.input.buffer.width;
                return 0;
            },
            operation);
        squares_.emplace_back(static_cast<size_t>(columns), 0.0);
    }
}

void Runner::check_blocks(const int32_t* blocks, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
        check_index("blocks", i, blocks[i], kv_.blocks(), "kv_blocks");
    }
}

void Runner::zero_blocks(const int32_t* blocks, int64_t count) {
    const std::vector<int32_t> copy(blocks, blocks + count);
    check_blocks(copy.data(), count);
    for (const int32_t block : copy) kv_.zero(block);
}

void Runner::release_blocks(const int32_t* blocks, int64_t count) {
    const std::vector<int32_t> copy(blocks, blocks + count);
    check_blocks(copy.data(), count);
    for (const int32_t block : copy) kv_.release(block);
}

void Runner::set_threads(int threads) {
    if (threads == program_.dimensions().threads) return;
    check_threads(threads);
    auto team = std::make_unique<Team>(threads);  // may fail, and the old one must live on then
    program_.set_threads(threads);
    team_ = std::move(team);
}

}  // namespace smolrun
