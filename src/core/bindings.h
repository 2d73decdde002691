// The parts of the extension module, one function each.
#pragma once

#include <nanobind/nanobind.h>

namespace smolrun {

void bind_kernels(nanobind::module_& module);   // bindings_kernels.cpp: the submodule `kernels`
void bind_quantize(nanobind::module_& module);  // bindings_quantize.cpp: quantize
void bind_runner(nanobind::module_& module);    // bindings_runner.cpp: Weight, Packing, Runner
void bind_sampling(nanobind::module_& module);  // bindings_sampling.cpp: all_finite, draw

// Releases the GIL while it lives. A thread that comes back after the interpreter has begun to
// exit sleeps for ever instead of taking the GIL: older Pythons would end it half way through C++
// frames, which aborts the process.
class GilReleased {
  public:
    GilReleased();
    ~GilReleased();
    GilReleased(const GilReleased&) = delete;
    GilReleased& operator=(const GilReleased&) = delete;

  private:
    PyThreadState* state_;
};

}  // namespace smolrun
