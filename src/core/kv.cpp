#include "kv.h"

#include <cstring>

namespace smolrun {

KvPool::KvPool(int64_t blocks, int64_t layers, int64_t kv_heads, int64_t head_dim)
    : blocks_(blocks),
      head_stride_(kv_elements(head_dim)),
      layer_stride_(checked_product(2 * kv_heads, head_stride_)),
      block_stride_(checked_product(layers, layer_stride_)),
      memory_(static_cast<size_t>(checked_product(blocks, checked_product(block_stride_, 2))),
              Pages::huge) {}

void KvPool::zero(int64_t block) {
    std::memset(data() + block * block_stride_, 0, static_cast<size_t>(block_bytes()));
}

void KvPool::release(int64_t block) {
    memory_.release(static_cast<size_t>(block * block_bytes()), static_cast<size_t>(block_bytes()));
}

}  // namespace smolrun
