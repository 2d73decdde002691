// Linking: from a list of named operations to one that can run, with every shape checked.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "operations.h"
#include "weight.h"

namespace smolrun {

// An operation as Python describes it: its kind, and its fields by name. No value is `None`.
struct OperationSpec {
    using Value = std::variant<std::monostate, bool, int64_t, double, std::string>;
    std::string kind;
    std::map<std::string, Value> fields;
};

struct ProgramSpec {
    std::vector<OperationSpec> operations;
    std::map<std::string, const Weight*> matrices;      // owned by the caller
    std::map<std::string, std::vector<float>> vectors;  // norms and biases
    std::map<std::string, int64_t> buffers;             // name -> floats a token
    std::vector<float> inverse_frequencies;             // [head_dim / 2]
    float attention_factor;
    Dimensions dimensions;
    std::string isa;
    std::string activations = "exact";  // or "fast": 8 bits where that costs little
};

// std::invalid_argument where a program can not run on so many.
void check_threads(int threads);

// Operations linked to memory that it owns. Weights stay the caller's.
class Program {
  public:
    // std::invalid_argument naming the operation and the field or weight that is wrong.
    explicit Program(ProgramSpec spec);

    const std::vector<Operation>& operations() const { return operations_; }
    // The last norm_qkv: what follows changes no K and V.
    size_t last_norm_qkv() const { return last_norm_qkv_; }
    bool multiplies_f16() const { return multiplies_f16_; }  // in some layer
    const std::vector<Buffer>& buffers() const { return buffers_; }
    const Dimensions& dimensions() const { return dimensions_; }
    const Kernels& kernels() const { return kernels_; }
    const Scratch& scratch() const { return scratch_; }
    int64_t hidden_size() const { return hidden_size_; }
    int64_t scratch_bytes() const { return static_cast<int64_t>(memory_.bytes()); }

    // Fills cosine and sine of the tokens of a step.
    void set_positions(const int32_t* positions, int64_t tokens) const;
    // Makes room for another number of threads. The buffers' contents are lost.
    void set_threads(int threads);

  private:
    void link();

    ProgramSpec spec_;
    Dimensions dimensions_;
    const Kernels& kernels_;
    AnonymousMemory memory_;
    Scratch scratch_;
    int64_t hidden_size_ = 0;
    std::vector<Operation> operations_;
    size_t last_norm_qkv_ = 0;
    bool multiplies_f16_ = false;
    std::vector<Buffer> buffers_;
};

}  // namespace smolrun
