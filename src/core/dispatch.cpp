#include "dispatch.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef SMOLRUN_X86
#include <cpuid.h>
#endif

namespace smolrun {
namespace {

#ifdef SMOLRUN_X86

struct Registers {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
    Registers r;
    if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
    return r;
}

// XCR0: which registers the operating system saves when it switches threads. A CPU that has
// AVX-512 is of no use under a system that does not save its registers.
uint64_t saved_registers() {
    uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

constexpr bool has(uint32_t word, uint32_t bits) { return (word & bits) == bits; }
constexpr uint32_t bit(int i) { return uint32_t{1} << i; }

struct Features {
    bool avx2 = false;
    bool avx512 = false;
};

// Bits: Intel's Software Developer's Manual, volume 2, CPUID.
Features detect() {
    Features found;
    const Registers leaf1 = cpuid(1, 0);
    constexpr uint32_t kFma = bit(12), kOsxsave = bit(27), kAvx = bit(28), kF16c = bit(29);
    if (!has(leaf1.ecx, kFma | kOsxsave | kAvx | kF16c)) return found;

    const uint64_t saved = saved_registers();
    constexpr uint64_t kYmm = 0x06, kZmm = 0xE6;  // SSE+AVX; and opmask, upper halves, upper 16
    if ((saved & kYmm) != kYmm) return found;

    const Registers leaf7 = cpuid(7, 0);
    constexpr uint32_t kAvx2 = bit(5), kBmi2 = bit(8);
    found.avx2 = has(leaf7.ebx, kAvx2 | kBmi2);

    constexpr uint32_t kF = bit(16), kDq = bit(17), kBw = bit(30), kVl = bit(31);
    constexpr uint32_t kVnni = bit(11);  // ecx
    found.avx512 = found.avx2 && (saved & kZmm) == kZmm && has(leaf7.ebx, kF | kDq | kBw | kVl) &&
                   has(leaf7.ecx, kVnni);
    return found;
}

#endif

std::vector<const Kernels*> supported_kernels() {
    std::vector<const Kernels*> found{&kScalarKernels};
#ifdef SMOLRUN_X86
    // Asked once: under a hypervisor, CPUID takes microseconds.
    static const Features features = detect();
    if (features.avx2) found.push_back(&kAvx2Kernels);
    if (features.avx512) found.push_back(&kAvx512Kernels);
#endif
    return found;
}

}  // namespace

std::vector<std::string_view> supported_isas() {
    std::vector<std::string_view> names;
    for (const Kernels* kernels : supported_kernels()) names.emplace_back(kernels->name);
    return names;
}

const Kernels& kernels_of(std::string_view isa) {
    std::string supported;
    for (const Kernels* kernels : supported_kernels()) {
        if (isa == kernels->name) return *kernels;
        supported += supported.empty() ? "" : ", ";
        supported += kernels->name;
    }
    throw std::invalid_argument("isa: this CPU runs " + supported + ", not '" + std::string(isa) +
                                "'");
}

}  // namespace smolrun
