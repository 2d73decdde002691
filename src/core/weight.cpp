#include "weight.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <stdexcept>
#include <string>

#include "threads.h"

namespace smolrun {
namespace {

constexpr int64_t kLargestSide = int64_t{1} << 31;
constexpr int64_t kChunkBytes = 4 << 20;  // packed at a time, then dropped from the source

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

Weight::Weight(const FileRows& source, int64_t source_bytes, int threads, bool drop_source,
               bool copy)
    : matrix_{} {
    check(source, source_bytes);
    matrix_ = {source.type, source.rows, source.columns, source.data};
    if (is_float(source.type) && source.interleaved_head_dim == 0 && !copy) return;

    packed_ = PooledMemory(
        static_cast<size_t>(smolrun::packed_bytes(source.type, source.rows, source.columns)));
    std::byte* const out = packed_.data();
    // Chunks hold whole heads, whose rows change places, and whole groups of rows.
    const int64_t unit = std::lcm(std::max<int64_t>(1, source.interleaved_head_dim), kGroupRows);
    const int64_t bytes = row_bytes(source.type, source.columns);
    const int64_t chunk_rows = std::max<int64_t>(1, kChunkBytes / (unit * bytes)) * unit;
    const int64_t chunks = (source.rows + chunk_rows - 1) / chunk_rows;
    Team team(static_cast<int>(std::clamp<int64_t>(threads, 1, chunks)));
    team.run([&](Worker& worker) {
        worker.phase(chunks, [&](int64_t chunk) {
            const int64_t begin = chunk * chunk_rows;
            const int64_t end = std::min(source.rows, begin + chunk_rows);
            pack(source, begin / kGroupRows, row_groups(end), out);
            if (drop_source) {
                drop_file_pages(source.data + begin * bytes,
                                static_cast<size_t>((end - begin) * bytes));
            }
        });
    });
    // The pages that two chunks share.
    if (drop_source) drop_file_pages(source.data, static_cast<size_t>(source_bytes));
    matrix_.data = out;
}

}  // namespace smolrun
