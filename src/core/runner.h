// Runs the steps of one model: a linked program, its KV cache and its threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kv.h"
#include "profile.h"
#include "program.h"
#include "threads.h"

namespace smolrun {

// A step as the caller asks for it; nothing has been checked but the lengths.
struct StepRequest {
    int64_t tokens;
    const int32_t* token_ids;  // [tokens]
    const int32_t* positions;  // [tokens], in their sequence
    const int32_t* sequences;  // [tokens], rows of block_tables
    int64_t sequence_count;
    int64_t blocks_per_sequence;
    const int32_t* block_tables;  // [sequence_count][blocks_per_sequence]
    int64_t logit_row_count;
    const int32_t* logit_rows;  // [logit_row_count], indexes of tokens
    float* logits;              // [logit_row_count][vocab_size], written; or null
    float* hidden;              // [logit_row_count][hidden_size], written; or null
};

class Runner {
  public:
    Runner(ProgramSpec spec, int64_t kv_blocks);

    // Marks the runner as in use. std::runtime_error where it already is, or in a forked child.
    class Use {
      public:
        explicit Use(Runner& runner);
        ~Use() { runner_.busy_.store(false, std::memory_order_release); }
        Use(const Use&) = delete;
        Use& operator=(const Use&) = delete;

      private:
        Runner& runner_;
    };

    // Checks a step and copies what it must not see change. std::invalid_argument naming the index
    // that is wrong. Nothing has been written then.
    void prepare(const StepRequest& request);
    // Carries out the prepared step. Touches no Python object.
    void run();

    void zero_blocks(const int32_t* blocks, int64_t count);
    void release_blocks(const int32_t* blocks, int64_t count);
    void set_threads(int threads);
    // Whether the steps from now on note when each operation was done.
    void set_profiling(bool on) { profiling_ = on; }
    // Whether the steps from now on add up the squares of the inputs of products, from 0.
    void collect_squares(bool on);

    // Of the last step that was profiled.
    const Profile& profile() const { return profile_; }
    // [operation][columns of its input], empty for an operation without products.
    const std::vector<std::vector<double>>& squares() const { return squares_; }
    const Program& program() const { return program_; }
    const KvPool& kv() const { return kv_; }
    int threads() const { return program_.dimensions().threads; }

  private:
    int64_t own_tokens(int64_t tokens) const;
    void reorder(std::vector<int32_t>& sequences);
    void narrow();
    template <class Finished>
    void run_operations(const StepContext& step, const StepContext& narrowed, Worker& worker,
                        Finished&& finished);
    void check_tokens(const StepRequest& request) const;
    void copy_tables(const StepRequest& request);
    void check_slots(const StepRequest& request);
    void check_logit_rows(const StepRequest& request) const;
    void check_blocks(const int32_t* blocks, int64_t count) const;

    Program program_;
    KvPool kv_;
    std::unique_ptr<Team> team_;
    std::atomic<bool> busy_{false};
    bool profiling_ = false;
    Profile profile_;
    std::vector<std::vector<double>> squares_;

    // The prepared step. The arrays are copies: their owner may change them at any time.
    StepArrays arrays_{};
    std::vector<int32_t> token_ids_;
    std::vector<int32_t> positions_;
    std::vector<int32_t> logit_rows_;
    std::vector<int32_t> tables_;          // the entries that are read, sequence after sequence
    std::vector<int64_t> last_positions_;  // [sequence], -1 where it has no token
    std::vector<int64_t> table_begins_;    // [sequence], in tables_
    std::vector<int64_t> slots_;           // [tokens], block * 32 + slot that each writes

    // What the step goes on with after K and V of the last layer (run_narrowing).
    StepArrays narrowed_{};
    std::vector<int32_t> narrowed_tokens_;      // indexes of tokens with logits, rising
    std::vector<int32_t> narrowed_positions_;   // of these
    std::vector<int32_t> narrowed_logit_rows_;  // [logit_row_count], indexes of these
};

}  // namespace smolrun
