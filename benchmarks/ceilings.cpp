// What one core of this machine can do at most: kernels.py builds this for an instruction set and
// sets its figures beside those of the kernels. Prints "name value" lines; see main.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

#ifdef __AVX512F__
using Words = __m512i;
using Floats = __m512;
constexpr int kLanes = 16;
constexpr int kChains = 24;
Words load(const Words* from) { return _mm512_loadu_si512(from); }
Words either(Words a, Words b) { return _mm512_or_si512(a, b); }
Words dot(Words total, Words a, Words b) { return _mm512_dpwssd_epi32(total, a, b); }
Floats fma(Floats total, Floats a, Floats b) { return _mm512_fmadd_ps(a, b, total); }
#else
using Words = __m256i;
using Floats = __m256;
constexpr int kLanes = 8;
constexpr int kChains = 12;
Words load(const Words* from) { return _mm256_loadu_si256(from); }
Words either(Words a, Words b) { return _mm256_or_si256(a, b); }
Words dot(Words total, Words a, Words b) {
    return _mm256_add_epi32(total, _mm256_madd_epi16(a, b));
}
Floats fma(Floats total, Floats a, Floats b) { return _mm256_fmadd_ps(a, b, total); }
#endif

// The best of several runs, in seconds: neighbours only ever slow a run down.
template <class Work>
double fastest(int runs, Work&& work) {
    double best = 1e9;
    for (int i = 0; i < runs; ++i) {
        const auto start = std::chrono::steady_clock::now();
        work();
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        best = std::min(best, took.count());
    }
    return best;
}

// Keeps a value, and whatever led to it, from being optimised away.
template <class T>
void keep(T& value) {
    __asm__ volatile("" : "+x"(value));
}

// Operations a second (a multiplication and an addition are two) with nothing but registers.
template <class T, class Step>
double rate(double operations_per_step, T zero, Step step) {
    constexpr int64_t steps = 500'000;
    const double seconds = fastest(200, [&] {
        T totals[kChains], a = zero, b = zero;
        for (T& total : totals) total = zero;
        keep(a);
        keep(b);
        for (int64_t i = 0; i < steps; ++i) {
            for (T& total : totals) {
                keep(a);  // else what does not change would be computed once
                total = step(total, a, b);
            }
        }
        for (T& total : totals) keep(total);
    });
    return operations_per_step * kChains * static_cast<double>(steps) / seconds;
}

double read_rate() {
    constexpr int64_t count = (int64_t{256} << 20) / static_cast<int64_t>(sizeof(Words));
    const std::vector<int64_t> memory(count * sizeof(Words) / sizeof(int64_t), 1);
    const double seconds = fastest(20, [&] {
        const Words* from = reinterpret_cast<const Words*>(memory.data());
        Words all[8] = {};
        for (int64_t i = 0; i < count; i += 8) {
            _mm_prefetch(reinterpret_cast<const char*>(from + i) + 4096, _MM_HINT_T0);
            for (int j = 0; j < 8; ++j) all[j] = either(all[j], load(from + i + j));
        }
        for (Words& one : all) keep(one);
    });
    return static_cast<double>(count * sizeof(Words)) / seconds;
}

}  // namespace

int main() {
    std::printf("read_GB/s %.1f\n", read_rate() / 1e9);
    std::printf("int16_GOP/s %.1f\n", rate(4 * kLanes, Words{}, [](Words t, Words a, Words b) {
                                          return dot(t, a, b);
                                      }) / 1e9);
    std::printf("f32_GFLOP/s %.1f\n", rate(2 * kLanes, Floats{}, [](Floats t, Floats a, Floats b) {
                                          return fma(t, a, b);
                                      }) / 1e9);
#ifdef __AVX512BF16__
    std::printf("bf16_GFLOP/s %.1f\n",
                rate(4 * kLanes, Floats{}, [](Floats total, Floats a, Floats b) {
                    return _mm512_dpbf16_ps(total, (__m512bh)a, (__m512bh)b);
                }) / 1e9);
    std::printf("int8_GOP/s %.1f\n", rate(8 * kLanes, Words{}, [](Words total, Words a, Words b) {
                                         return _mm512_dpbusd_epi32(total, a, b);
                                     }) / 1e9);
#endif
}
