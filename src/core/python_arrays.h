// Arrays that come from Python, checked through the buffer protocol.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>
#include <vector>

namespace smolrun {

enum class Element { int8, uint8, int16, int32, float32 };

// Keeps the array's memory alive and in place. Needs the GIL at both ends of its life.
class Array {
  public:
    // TypeError where `object` is not a C-contiguous array of this element type (or not writable,
    // where that is asked), ValueError where it has another number of dimensions; both name it.
    Array(nanobind::handle object, const char* name, Element element, int dimensions,
          bool writable = false);
    ~Array();
    Array(Array&& other) noexcept;
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;

    int64_t size(int dimension) const { return shape_[static_cast<size_t>(dimension)]; }
    int64_t bytes() const { return bytes_; }
    bool readonly() const { return readonly_; }

    template <class T>
    T* data() const {
        return static_cast<T*>(data_);
    }

    // ValueError where the shape is another one.
    void expect_shape(const std::vector<int64_t>& shape) const;

  private:
    Py_buffer buffer_{};
    std::string name_;
    void* data_ = nullptr;
    std::vector<int64_t> shape_;
    int64_t bytes_ = 0;
    bool readonly_ = false;
};

}  // namespace smolrun
