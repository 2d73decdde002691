// Large blocks of memory straight from the operating system: page aligned, zero, and taken only
// page by page as they are touched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace smolrun {

enum class Pages { small, huge };

// Owns one anonymous mapping. std::bad_alloc where the system refuses it.
class AnonymousMemory {
  public:
    AnonymousMemory() = default;
    // Huge pages, where the system has them: what is streamed through spends less time on finding
    // pages, in a virtual machine above all. Memory is then taken 2 MiB at a time.
    explicit AnonymousMemory(size_t bytes, Pages pages = Pages::small);
    ~AnonymousMemory();
    AnonymousMemory(AnonymousMemory&& other) noexcept;
    AnonymousMemory& operator=(AnonymousMemory&& other) noexcept;
    AnonymousMemory(const AnonymousMemory&) = delete;
    AnonymousMemory& operator=(const AnonymousMemory&) = delete;

    std::byte* data() const { return data_; }
    size_t bytes() const { return bytes_; }

    // Makes a range zero, giving its whole pages back to the system.
    void release(size_t offset, size_t bytes);

  private:
    std::byte* data_ = nullptr;
    size_t bytes_ = 0;
};

// A part of an anonymous mapping of huge pages that many weights share: most of them are too small
// to fill huge pages by themselves. Its pages go back to the system with it, the mapping with the
// last of its parts. May be made and destroyed on any thread.
class PooledMemory {
  public:
    PooledMemory() = default;
    explicit PooledMemory(size_t bytes);
    ~PooledMemory();
    PooledMemory(PooledMemory&& other) noexcept;
    PooledMemory& operator=(PooledMemory&& other) noexcept;
    PooledMemory(const PooledMemory&) = delete;
    PooledMemory& operator=(const PooledMemory&) = delete;

    std::byte* data() const { return data_; }
    size_t bytes() const { return bytes_; }

  private:
    std::shared_ptr<AnonymousMemory> mapping_;
    std::byte* data_ = nullptr;
    size_t bytes_ = 0;
};

// Lays arrays out one after the other in memory that is taken afterwards, in one piece: measure
// with a null base first, then place with the real one.
class Layout {
  public:
    explicit Layout(std::byte* base) : base_(base) {}

    // An array that starts on its own pair of cache lines, so that threads never share one.
    template <class T>
    T* array(int64_t count) {
        const size_t offset = reserve(count, sizeof(T));
        return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + offset);
    }

    size_t bytes() const { return bytes_; }

  private:
    size_t reserve(int64_t count, size_t element_bytes);

    std::byte* base_;
    size_t bytes_ = 0;
};

size_t page_bytes();

// a * b for sizes; std::length_error where the product does not fit.
int64_t checked_product(int64_t a, int64_t b);

// A range of addresses; empty where `end` is not above `begin`.
struct Addresses {
    uintptr_t begin = 0;
    uintptr_t end = 0;
    bool empty() const { return end <= begin; }
};

// The read-only mappings of files that this process had when this was made.
class FileMappings {
  public:
    FileMappings();
    // The one that holds a whole range; empty where none does.
    Addresses around(const std::byte* data, size_t bytes) const;

  private:
    std::vector<Addresses> mappings_;
};

// Lets the system take back what reading a range of `mapping`, of a file, brought into memory. It
// is read again when touched.
void drop_file_pages(const Addresses& mapping, const std::byte* data, size_t bytes);

// Gives the whole pages of a range of memory that is no file's back to the system. What they held
// is lost.
void give_up_pages(const std::byte* data, size_t bytes);

}  // namespace smolrun
