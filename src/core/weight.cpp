#include "weight.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace smolrun {
namespace {

constexpr int64_t kLargestSide = int64_t{1} << 31;
constexpr int64_t kChunkBytes = 1 << 20;  // packed at a time, then dropped from the source

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

void check(const FileRows& source, int64_t source_bytes) {
    if (source.rows < 1 || source.rows > kLargestSide || source.columns < 1 ||
        source.columns > kLargestSide) {
        fail("shape (" + std::to_string(source.rows) + ", " + std::to_string(source.columns) +
             "): expected 1 to 2147483648 rows and columns");
    }
    const int64_t block = layout(source.type).weights;
    if (source.columns % block != 0) {
        fail("columns is " + std::to_string(source.columns) + "; " + layout(source.type).name +
             " has blocks of " + std::to_string(block) + " weights");
    }
    const int64_t expected = checked_product(source.rows, row_bytes(source.type, source.columns));
    if (source_bytes != expected) {
        fail("data has " + std::to_string(source_bytes) + " bytes; expected " +
             std::to_string(expected));
    }
    const int64_t head_dim = source.interleaved_head_dim;
    if (head_dim < 0 || head_dim % 2 != 0 || (head_dim > 0 && source.rows % head_dim != 0)) {
        fail("interleaved_head_dim is " + std::to_string(head_dim) +
             "; expected 0 or an even number that divides the rows, " +
             std::to_string(source.rows));
    }
}

}  // namespace

Weight::Weight(const FileRows& source, int64_t source_bytes)
    : source_(source), matrix_{source.packed_type(), source.rows, source.columns, nullptr} {
    check(source, source_bytes);
    packed_ = PooledMemory(
        static_cast<size_t>(smolrun::packed_bytes(matrix_.type, source.rows, source.columns)));
    matrix_.data = packed_.data();
    // Chunks hold whole heads, whose rows change places, and whole groups of rows.
    const int64_t unit = std::lcm(std::max<int64_t>(1, source.interleaved_head_dim), kGroupRows);
    const int64_t bytes = row_bytes(source.type, source.columns);
    chunk_rows_ = std::max<int64_t>(1, kChunkBytes / (unit * bytes)) * unit;
    chunks_ = (source.rows + chunk_rows_ - 1) / chunk_rows_;
}

int64_t Weight::chunk_begin(int64_t chunk) const {
    return std::min(chunk * chunk_rows_, source_.rows);
}

int64_t Weight::chunk_bytes(int64_t chunk) const {
    return (chunk_begin(chunk + 1) - chunk_begin(chunk)) * row_bytes(source_.type, source_.columns);
}

void Weight::pack(int64_t chunk, const SourceRelease& release) {
    const int64_t begin = chunk_begin(chunk);
    smolrun::pack(source_, begin / kGroupRows, row_groups(chunk_begin(chunk + 1)), packed_.data());
    const std::byte* const data = source_.data + begin * row_bytes(source_.type, source_.columns);
    const auto bytes = static_cast<size_t>(chunk_bytes(chunk));
    if (!release.file.empty()) drop_file_pages(release.file, data, bytes);
    if (release.consumed) give_up_pages(data, bytes);
}

Packing::Packing(std::vector<Item> items) : items_(std::move(items)) {
    for (const Item& item : items_) ends_.push_back(total() + item.weight->chunks());
}

bool Packing::work(int64_t chunks) {
    for (; chunks > 0; --chunks) {
        const int64_t ticket = next_.fetch_add(1, std::memory_order_relaxed);
        if (ticket >= total()) return true;
        const auto at = std::upper_bound(ends_.begin(), ends_.end(), ticket);
        const Item& item = items_[static_cast<size_t>(at - ends_.begin())];
        const int64_t chunk = ticket - (*at - item.weight->chunks());
        item.weight->pack(chunk, item.release);
        bytes_done_.fetch_add(item.weight->chunk_bytes(chunk), std::memory_order_relaxed);
        chunks_done_.fetch_add(1, std::memory_order_release);
    }
    return next_.load(std::memory_order_relaxed) >= total();
}

}  // namespace smolrun
