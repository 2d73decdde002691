// The module smolrun._core. Every array that comes from Python is checked here or in what this
// folder calls, before the GIL is released: shape, type, contiguity and the range of every index.
#include "bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "ceilings.h"
#include "dispatch.h"
#include "machine.h"

namespace nb = nanobind;

namespace smolrun {
namespace {

std::atomic<bool> exiting{false};
std::atomic<std::thread::id> exiting_thread{};

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const std::string_view name : supported_isas()) names.emplace_back(name);
    return names;
}

nb::dict machine() {
    const Machine found = this_machine();
    nb::dict result;
    result["cpu_name"] = found.cpu_name;
    result["flags"] = found.flags;
    result["physical_cores"] = found.physical_cores;
    result["affinity"] = found.affinity;
    return result;
}

nb::dict ceilings(const std::string& isa, int threads, int samples, int64_t read_bytes) {
    std::vector<Ceiling> found;
    {
        const GilReleased released;
        found = measure_ceilings(isa, threads, samples, read_bytes);
    }
    nb::dict result;
    for (const Ceiling& ceiling : found) result[ceiling.name.c_str()] = ceiling.rates;
    return result;
}

}  // namespace

GilReleased::GilReleased() : state_(PyEval_SaveThread()) {}

GilReleased::~GilReleased() {
    while (exiting.load(std::memory_order_acquire) &&
           std::this_thread::get_id() != exiting_thread.load(std::memory_order_relaxed)) {
        std::this_thread::sleep_for(std::chrono::hours(1));
    }
    PyEval_RestoreThread(state_);
}

}  // namespace smolrun

NB_MODULE(_core, module) {
    using namespace smolrun;
    // What is still alive at exit, in a daemon thread say, is no concern of the user's.
    nb::set_leak_warnings(false);
    module.def("isas", &isas);
    module.def("default_isa", [] { return isas().back(); });
    module.def("machine", &machine);
    module.def("ceilings", &ceilings, nb::arg("isa"), nb::arg("threads"), nb::arg("samples") = 5,
               nb::arg("read_bytes") = int64_t{256} << 20);
    bind_runner(module);
    bind_kernels(module);
    bind_quantize(module);
    bind_sampling(module);

    // Runs after non-daemon threads have been joined, when only the exiting thread still matters.
    nb::module_::import_("atexit").attr("register")(nb::cpp_function([] {
        exiting_thread.store(std::this_thread::get_id(), std::memory_order_relaxed);
        exiting.store(true, std::memory_order_release);
    }));
}
