#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>

namespace smolrun {
#ifdef __linux__
namespace {

Addresses whole_pages(const std::byte* data, size_t bytes) {
    const uintptr_t page = page_bytes();
    const uintptr_t first = reinterpret_cast<uintptr_t>(data);
    return {(first + page - 1) / page * page, (first + bytes) / page * page};
}

}  // namespace
#endif

size_t page_bytes() {
    static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
}

int64_t checked_product(int64_t a, int64_t b) {
    int64_t product = 0;
    if (__builtin_mul_overflow(a, b, &product) || product < 0) {
        throw std::length_error("a size does not fit 63 bits");
    }
    return product;
}

AnonymousMemory::AnonymousMemory(size_t bytes, Pages pages) {
    if (bytes == 0) return;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
    flags |= MAP_NORESERVE;
#endif
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<std::byte*>(data);
    bytes_ = bytes;
#ifdef MADV_HUGEPAGE
    // A wish: a system without huge pages does without. Recent ones align large mappings to them.
    if (pages == Pages::huge) (void)madvise(data, bytes, MADV_HUGEPAGE);
#else
    (void)pages;
#endif
}

AnonymousMemory::~AnonymousMemory() {
    if (data_ != nullptr) munmap(data_, bytes_);
}

AnonymousMemory::AnonymousMemory(AnonymousMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

AnonymousMemory& AnonymousMemory::operator=(AnonymousMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
}

void AnonymousMemory::release(size_t offset, size_t bytes) {
    std::byte* const begin = data_ + offset;
    std::byte* const end = begin + bytes;
#ifdef __linux__
    // Only Linux promises that the dropped pages come back as zeros.
    const Addresses pages = whole_pages(begin, bytes);
    if (!pages.empty()) {
        std::byte* const first = begin + (pages.begin - reinterpret_cast<uintptr_t>(begin));
        std::byte* const last = first + (pages.end - pages.begin);
        if (madvise(first, pages.end - pages.begin, MADV_DONTNEED) == 0) {
            std::memset(begin, 0, static_cast<size_t>(first - begin));
            std::memset(last, 0, static_cast<size_t>(end - last));
            return;
        }
    }
#endif
    std::memset(begin, 0, static_cast<size_t>(end - begin));
}

namespace {

// Where the next part is cut from. The parts own the mapping.
struct Pool {
    std::mutex mutex;
    std::weak_ptr<AnonymousMemory> mapping;
    size_t used = 0;
};

Pool& pool() {
    static Pool* const shared = new Pool;  // parts may outlive static objects
    return *shared;
}

}  // namespace

PooledMemory::PooledMemory(size_t bytes) {
    if (bytes == 0) return;
    // Only address space is taken beforehand, so the size costs nothing.
    constexpr size_t kMappingBytes = size_t{64} << 20;
    const size_t rounded = (bytes + page_bytes() - 1) / page_bytes() * page_bytes();
    if (rounded < bytes) throw std::bad_alloc();
    Pool& from = pool();
    const std::lock_guard<std::mutex> lock(from.mutex);
    mapping_ = from.mapping.lock();
    if (mapping_ == nullptr || mapping_->bytes() - from.used < rounded) {
        mapping_ = std::make_shared<AnonymousMemory>(std::max(rounded, kMappingBytes), Pages::huge);
        from.mapping = mapping_;
        from.used = 0;
    }
    data_ = mapping_->data() + from.used;
    bytes_ = bytes;
    from.used += rounded;
}

PooledMemory::~PooledMemory() {
    if (data_ == nullptr) return;
    mapping_->release(static_cast<size_t>(data_ - mapping_->data()), bytes_);
}

PooledMemory::PooledMemory(PooledMemory&& other) noexcept
    : mapping_(std::move(other.mapping_)),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

PooledMemory& PooledMemory::operator=(PooledMemory&& other) noexcept {
    std::swap(mapping_, other.mapping_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
}

size_t Layout::reserve(int64_t count, size_t element_bytes) {
    constexpr size_t kAlignment = 128;  // two lines: x86 fetches them in pairs
    const int64_t bytes = checked_product(count, static_cast<int64_t>(element_bytes));
    const size_t offset = bytes_;
    const size_t end = offset + static_cast<size_t>(bytes);
    if (end < offset || end > std::numeric_limits<size_t>::max() / 4) {
        throw std::length_error("the scratch memory does not fit the address space");
    }
    bytes_ = (end + kAlignment - 1) / kAlignment * kAlignment;
    return offset;
}

FileMappings::FileMappings() {
#ifdef __linux__
    // Lines of "begin-end perms offset device inode path", addresses and offset in hexadecimal.
    std::FILE* maps = std::fopen("/proc/self/maps", "re");
    if (maps == nullptr) return;
    char line[512];
    bool at_line_start = true;  // long paths come in several pieces
    while (std::fgets(line, sizeof line, maps) != nullptr) {
        unsigned long first = 0, last = 0, inode = 0;
        char permissions[5] = {};
        if (at_line_start &&
            std::sscanf(line, "%lx-%lx %4s %*x %*x:%*x %lu", &first, &last, permissions, &inode) ==
                4 &&
            inode != 0 && permissions[1] != 'w') {
            mappings_.push_back({first, last});
        }
        at_line_start = std::strchr(line, '\n') != nullptr;
    }
    std::fclose(maps);
#endif
}

Addresses FileMappings::around(const std::byte* data, size_t bytes) const {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
    for (const Addresses& mapping : mappings_) {
        if (mapping.begin <= begin && begin + bytes <= mapping.end) return mapping;
    }
    return {};
}

void drop_file_pages(const Addresses& mapping, const std::byte* data, size_t bytes) {
#ifdef __linux__
    // A page that is touched brings its neighbours along, as many as the system holds in one piece.
    // Whoever still needs one of these reads it again.
    constexpr uintptr_t kAround = 2 << 20;
    const uintptr_t first = reinterpret_cast<uintptr_t>(data);
    const uintptr_t begin = first / kAround * kAround;
    const uintptr_t end = (first + bytes + kAround - 1) / kAround * kAround;
    const uintptr_t from = std::max(begin, mapping.begin), to = std::min(end, mapping.end);
    if (from < to) (void)madvise(reinterpret_cast<void*>(from), to - from, MADV_DONTNEED);
#else
    (void)mapping, (void)data, (void)bytes;
#endif
}

void give_up_pages(const std::byte* data, size_t bytes) {
#ifdef __linux__
    const Addresses pages = whole_pages(data, bytes);
    if (pages.empty()) return;
    (void)madvise(reinterpret_cast<void*>(pages.begin), pages.end - pages.begin, MADV_DONTNEED);
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace smolrun
