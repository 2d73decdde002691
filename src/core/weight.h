// A weight that is ready for the kernels.
#pragma once

#include <cstdint>

#include "blocks.h"
#include "memory.h"
#include "pack.h"

namespace smolrun {

// Holds the packed copy of a weight; or, for a float type whose rows stand in order, where no copy
// is asked for, only points to the source, which must then outlive it.
class Weight {
  public:
    // Packs on `threads` threads. With drop_source the pages of a mapped file are given back as
    // they are packed, so that memory never holds two copies. std::invalid_argument where the
    // source does not fit its shape.
    Weight(const FileRows& source, int64_t source_bytes, int threads, bool drop_source, bool copy);

    const Matrix& matrix() const { return matrix_; }
    bool borrows() const { return packed_.data() == nullptr; }
    int64_t packed_bytes() const { return static_cast<int64_t>(packed_.bytes()); }

  private:
    PooledMemory packed_;
    Matrix matrix_;
};

}  // namespace smolrun
