// A weight that is ready for the kernels.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "blocks.h"
#include "memory.h"
#include "pack.h"

namespace smolrun {

// What becomes of the memory of a source as it is packed, so that there are never two copies.
struct SourceRelease {
    Addresses file;         // the mapping of a file that holds it: pages are dropped; else empty
    bool consumed = false;  // memory that nobody else reads: pages are given up, and are zero then
};

// Holds the packed copy of a weight.
class Weight {
  public:
    // Takes the memory of the copy; `pack` fills it. std::invalid_argument where the source does
    // not fit its shape.
    Weight(const FileRows& source, int64_t source_bytes);

    // The copy is made in chunks, each of them once, in any order and on any thread.
    int64_t chunks() const { return chunks_; }
    void pack(int64_t chunk, const SourceRelease& release);

    int64_t chunk_bytes(int64_t chunk) const;  // of the source

    const Matrix& matrix() const { return matrix_; }
    WeightType source_type() const { return source_.type; }
    int64_t packed_bytes() const { return static_cast<int64_t>(packed_.bytes()); }

  private:
    int64_t chunk_begin(int64_t chunk) const;  // its first row

    FileRows source_;
    PooledMemory packed_;
    Matrix matrix_;
    int64_t chunk_rows_ = 0;
    int64_t chunks_ = 0;
};

// The packing of many weights, by as many threads as call `work`.
class Packing {
  public:
    struct Item {
        Weight* weight;  // must outlive the packing
        SourceRelease release;
    };

    explicit Packing(std::vector<Item> items);

    // Packs at most `chunks` chunks that nobody has taken. True once none is left to take; other
    // threads may still be at theirs.
    bool work(int64_t chunks);
    // Has every thread return from `work` after its current chunk.
    void stop() { next_.store(total(), std::memory_order_relaxed); }

    bool done() const { return chunks_done_.load(std::memory_order_acquire) == total(); }
    int64_t bytes_done() const { return bytes_done_.load(std::memory_order_relaxed); }

  private:
    int64_t total() const { return ends_.empty() ? 0 : ends_.back(); }

    std::vector<Item> items_;
    std::vector<int64_t> ends_;  // [items], chunks up to the end of each
    std::atomic<int64_t> next_{0};
    std::atomic<int64_t> chunks_done_{0};
    std::atomic<int64_t> bytes_done_{0};  // of the sources
};

}  // namespace smolrun
