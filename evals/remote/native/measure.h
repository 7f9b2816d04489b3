// The measurement that both runners make: load, then answers, each timed by stage; what came out is printed.
//
// In: a plan and a Backend that carries its steps out. Out: lines on stdout that evals/remote/runner_output.py reads.
// Not here: preparing the picture and the prompt, which the computer did before, and text.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "plan.h"

namespace pocketvlm {

/// A bundle that is open. Logits are (vocabulary,), valid until the next call.
class Backend {
  public:
    virtual ~Backend() = default;
    /// The features of the plan's views; they are kept for `prefill`.
    virtual void encode() = 0;
    /// Forgets the last sequence and runs the plan's prompt.
    virtual const float* prefill() = 0;
    /// One more token at a position (the same in every row of positions).
    virtual const float* decode(int64_t token, int64_t position) = 0;
    virtual int64_t vocabulary() const = 0;
};

using Open = std::function<std::unique_ptr<Backend>(const Plan&)>;
using Clock = std::chrono::steady_clock;

inline double ms_since(Clock::time_point start) {
    return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

/// The id of the largest logit, the lowest one of equals.
inline int64_t choose(const float* logits, int64_t vocabulary) {
    int64_t best = 0;
    for (int64_t id = 0; id < vocabulary; ++id) {
        if (std::isnan(logits[id])) throw Error("decoder: its logits are not numbers");
        if (logits[id] > logits[best]) best = id;
    }
    return best;
}

/// The largest resident memory of this process so far, in KiB; 0 where the system does not say.
inline long peak_kib() {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);) {
        if (line.rfind("VmHWM:", 0) == 0) return std::strtol(line.c_str() + 6, nullptr, 10);
    }
    return 0;
}

/// The file name of the program that runs, as the kernel knows it. qemu-user shows a program itself at
/// /proc/self/exe, but not there.
inline std::string program() {
    char path[4096];
    const std::string link = "/proc/self/task/" + std::to_string(getpid()) + "/exe";
    const ssize_t length = readlink(link.c_str(), path, sizeof path);
    const std::string found(path, length > 0 ? static_cast<size_t>(length) : 0);
    return found.empty() ? "unknown" : found.substr(found.rfind('/') + 1);
}

/// The largest logits as text: id, value, id, value, ...
inline std::string largest(const float* logits, int64_t vocabulary) {
    std::vector<int64_t> ids(static_cast<size_t>(vocabulary));
    std::iota(ids.begin(), ids.end(), 0);
    const auto end = ids.begin() + std::min<int64_t>(5, vocabulary);
    std::partial_sort(ids.begin(), end, ids.end(), [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
    std::string found;
    for (auto id = ids.begin(); id != end; ++id) {
        char text[64];
        std::snprintf(text, sizeof text, " %lld %.9g", static_cast<long long>(*id), static_cast<double>(logits[*id]));
        found += text;
    }
    return found;
}

/// One answer: it is printed when it is over, and looking at the first logits is in no time.
inline void answer(Backend& backend, const Plan& plan, bool kept, bool is_first) {
    std::vector<int64_t> tokens;
    std::vector<double> decode_ms;
    const Clock::time_point start = Clock::now();
    if (!plan.views.empty()) backend.encode();
    const double encode_ms = ms_since(start);
    const Clock::time_point encoded = Clock::now();
    const float* logits = backend.prefill();
    const double prefill_ms = ms_since(encoded);
    tokens.push_back(choose(logits, backend.vocabulary()));
    const double first_ms = ms_since(start);
    const Clock::time_point looking = Clock::now();
    if (is_first) std::printf("logits%s\n", largest(logits, backend.vocabulary()).c_str());
    const double looked_ms = ms_since(looking);
    for (int64_t step = 0; step + 1 < plan.tokens; ++step) {
        const Clock::time_point mark = Clock::now();
        logits = backend.decode(tokens.back(), plan.next_position + step);
        decode_ms.push_back(ms_since(mark));
        tokens.push_back(choose(logits, backend.vocabulary()));
    }
    const double total_ms = ms_since(start) - looked_ms;
    if (!kept) return;
    std::printf("answer encode_ms %.6f prefill_ms %.6f first_ms %.6f total_ms %.6f\ndecode_ms", encode_ms, prefill_ms,
                first_ms, total_ms);
    for (const double each : decode_ms) std::printf(" %.6f", each);
    std::printf("\ntokens");
    for (const int64_t each : tokens) std::printf(" %lld", static_cast<long long>(each));
    std::printf("\n");
}

inline void measure(const Plan& plan, const Open& open) {
    std::printf("program %s\n", program().c_str());
    const Clock::time_point start = Clock::now();
    const std::unique_ptr<Backend> backend = open(plan);
    std::printf("load_ms %.6f\nload_peak_kib %ld\n", ms_since(start), peak_kib());
    for (int number = 0; number < plan.warmup + plan.repeats; ++number) {
        answer(*backend, plan, number >= plan.warmup, number == 0);
    }
    std::printf("peak_kib %ld\ndone\n", peak_kib());
}

/// `PROGRAM --version` says what it runs with; `PROGRAM plan.txt` measures. Failure: one line on stderr, code 1.
inline int run(int count, char** arguments, const std::string& backend, const std::string& version, const Open& open) {
    if (count == 2 && !std::strcmp(arguments[1], "--version")) {
        std::printf("pocketvlm-runner %d %s %s\n", PLAN_VERSION, backend.c_str(), version.c_str());
        return 0;
    }
    if (count != 2) {
        std::fprintf(stderr, "usage: %s plan.txt | --version\n", arguments[0]);
        return 2;
    }
    try {
        const Plan plan = read_plan(arguments[1]);
        if (plan.backend != backend) throw Error("plan: is for " + plan.backend + ", this runner has " + backend);
        measure(plan, open);
        return 0;
    } catch (const std::exception& error) {
        std::fflush(stdout);
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}

}  // namespace pocketvlm
