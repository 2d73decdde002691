#include "python_arrays.h"

#include <cstring>
#include <utility>

namespace nb = nanobind;

namespace smolrun {
namespace {

struct ElementType {
    const char* name;
    const char* formats;  // struct-module letters of native types with this size and meaning
    int64_t bytes;
};

constexpr ElementType element_type(Element element) {
    switch (element) {
        case Element::int8:
            return {"int8", "b", 1};
        case Element::uint8:
            return {"uint8", "B", 1};
        case Element::int16:
            return {"int16", "h", 2};
        case Element::int32:
            return {"int32", "il", 4};
        case Element::float32:
            return {"float32", "f", 4};
    }
    return {"", "", 0};
}

std::string text(const std::vector<int64_t>& shape) {
    std::string result = "(";
    for (size_t i = 0; i < shape.size(); ++i) {
        result += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
    }
    result += shape.size() == 1 ? ",)" : ")";
    return result;
}

bool matches(const Py_buffer& buffer, const ElementType& type) {
    const char* format = buffer.format == nullptr ? "B" : buffer.format;
    if (*format == '@' || *format == '=') ++format;
    return buffer.itemsize == type.bytes && std::strlen(format) == 1 &&
           std::strchr(type.formats, *format) != nullptr;
}

}  // namespace

Array::Array(nb::handle object, const char* name, Element element, int dimensions, bool writable)
    : name_(name) {
    const ElementType type = element_type(element);
    const std::string expected =
        name_ + ": expected a C-contiguous " + (writable ? "writable " : "") + type.name + " array";
    const int flags = PyBUF_FORMAT | PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(object.ptr(), &buffer_, flags) != 0) {
        PyErr_Clear();
        throw nb::type_error(expected.c_str());
    }
    const bool same_type = matches(buffer_, type);
    const bool aligned =
        reinterpret_cast<uintptr_t>(buffer_.buf) % static_cast<uintptr_t>(type.bytes) == 0;
    if (!same_type || !aligned) {
        PyBuffer_Release(&buffer_);
        throw nb::type_error((expected + (same_type ? ", aligned to its element" : "")).c_str());
    }
    if (buffer_.ndim != dimensions) {
        const int found = buffer_.ndim;
        PyBuffer_Release(&buffer_);
        throw nb::value_error((name_ + ": expected " + std::to_string(dimensions) +
                               " dimensions, found " + std::to_string(found))
                                  .c_str());
    }
    data_ = buffer_.buf;
    bytes_ = static_cast<int64_t>(buffer_.len);
    readonly_ = buffer_.readonly != 0;
    for (int i = 0; i < dimensions; ++i) shape_.push_back(static_cast<int64_t>(buffer_.shape[i]));
}

Array::Array(Array&& other) noexcept
    : buffer_(std::exchange(other.buffer_, Py_buffer{})),
      name_(std::move(other.name_)),
      data_(std::exchange(other.data_, nullptr)),
      shape_(std::move(other.shape_)),
      bytes_(other.bytes_),
      readonly_(other.readonly_) {}

Array::~Array() {
    if (buffer_.obj != nullptr) PyBuffer_Release(&buffer_);
}

void Array::expect_shape(const std::vector<int64_t>& shape) const {
    if (shape_ == shape) return;
    throw nb::value_error(
        (name_ + ": expected shape " + text(shape) + ", found " + text(shape_)).c_str());
}

}  // namespace smolrun
