// The KV cache: one pool of blocks of 32 tokens.
//
// A block holds its tokens in all layers:
//     [layer]{ K: [kv_heads][kv_elements], V: [kv_heads][kv_elements] }
// The pool is one anonymous mapping, taken page by page as blocks are first written.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "memory.h"

namespace smolrun {

class KvPool {
  public:
    // std::length_error where the pool does not fit the address space, std::bad_alloc where the
    // system refuses it.
    KvPool(int64_t blocks, int64_t layers, int64_t kv_heads, int64_t head_dim);

    int64_t blocks() const { return blocks_; }
    int64_t block_bytes() const { return block_stride_ * static_cast<int64_t>(sizeof(int16_t)); }
    int64_t bytes() const { return static_cast<int64_t>(memory_.bytes()); }

    int16_t* data() const { return reinterpret_cast<int16_t*>(memory_.data()); }
    int64_t block_stride() const { return block_stride_; }  // elements between two blocks

    // Element offsets, inside a block, of one layer's and head's K and V.
    int64_t k_offset(int64_t layer, int64_t kv_head) const {
        return layer * layer_stride_ + kv_head * head_stride_;
    }
    int64_t v_offset(int64_t layer, int64_t kv_head) const {
        return k_offset(layer, kv_head) + layer_stride_ / 2;
    }

    void zero(int64_t block);     // wipes it
    void release(int64_t block);  // wipes it and gives its pages back

  private:
    int64_t blocks_;
    int64_t head_stride_;   // kv_elements
    int64_t layer_stride_;  // K and V of a layer
    int64_t block_stride_;
    AnonymousMemory memory_;
};

}  // namespace smolrun
