#include "machine.h"

#include <fstream>
#include <optional>
#include <set>
#include <sstream>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

namespace smolrun {
namespace {

int logical_cpus() {
    const unsigned count = std::thread::hardware_concurrency();
    return count == 0 ? 1 : static_cast<int>(count);
}

#ifdef __linux__

// Numbers of the CPUs in this thread's affinity mask; empty where the system does not say.
std::vector<int> allowed_cpus() {
    // The mask must be at least as long as the kernel's, whose length is not told.
    for (int size = 1024; size <= (1 << 20); size *= 2) {
        cpu_set_t* const mask = CPU_ALLOC(static_cast<size_t>(size));
        if (mask == nullptr) break;
        const size_t bytes = CPU_ALLOC_SIZE(static_cast<size_t>(size));
        CPU_ZERO_S(bytes, mask);
        std::vector<int> cpus;
        const bool known = sched_getaffinity(0, bytes, mask) == 0;
        for (int cpu = 0; known && cpu < size; ++cpu) {
            if (CPU_ISSET_S(static_cast<size_t>(cpu), bytes, mask)) cpus.push_back(cpu);
        }
        CPU_FREE(mask);
        if (known) return cpus;
    }
    return {};
}

std::optional<std::string> first_line(const std::string& path) {
    std::ifstream file(path);
    std::string line;
    if (!std::getline(file, line)) return std::nullopt;
    return line;
}

// Hyper-threads of a core share its list of siblings.
int count_cores(const std::vector<int>& cpus) {
    std::set<std::string> cores;
    for (const int cpu : cpus) {
        const std::string topology =
            "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
        std::optional<std::string> siblings = first_line(topology + "core_cpus_list");
        if (!siblings) siblings = first_line(topology + "thread_siblings_list");
        cores.insert(siblings ? *siblings : "cpu " + std::to_string(cpu));
    }
    return static_cast<int>(cores.size());
}

void read_cpuinfo(Machine& machine) {
    std::ifstream file("/proc/cpuinfo");
    std::string line;
    while (std::getline(file, line)) {
        const size_t colon = line.find(':');
        if (colon == std::string::npos) {
            if (!machine.flags.empty()) return;  // the first processor has been read
            continue;
        }
        const std::string key = line.substr(0, line.find_last_not_of(" \t", colon - 1) + 1);
        const std::string value = colon + 2 <= line.size() ? line.substr(colon + 2) : "";
        if (key == "model name") machine.cpu_name = value;
        if (key == "flags" || key == "Features") {
            std::istringstream words(value);
            std::string word;
            while (words >> word) machine.flags.push_back(word);
        }
    }
}

#endif

#ifdef __APPLE__

int read_number(const char* name, int fallback) {
    int value = 0;
    size_t size = sizeof value;
    const bool known = sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value > 0;
    return known ? value : fallback;
}

std::string read_text(const char* name) {
    char value[256] = {};
    size_t size = sizeof value - 1;
    return sysctlbyname(name, value, &size, nullptr, 0) == 0 ? value : "";
}

#endif

}  // namespace

Machine this_machine() {
    Machine machine{};
    machine.affinity = logical_cpus();
    machine.physical_cores = machine.affinity;
#ifdef __linux__
    const std::vector<int> cpus = allowed_cpus();
    if (!cpus.empty()) {
        machine.affinity = static_cast<int>(cpus.size());
        machine.physical_cores = count_cores(cpus);
    }
    read_cpuinfo(machine);
#endif
#ifdef __APPLE__
    machine.cpu_name = read_text("machdep.cpu.brand_string");
    machine.affinity = read_number("hw.logicalcpu", machine.affinity);
    machine.physical_cores = read_number("hw.physicalcpu", machine.affinity);
#endif
    return machine;
}

}  // namespace smolrun
