// The plan of a measurement, as evals/remote/runner_plan.py writes it: lines of words, files of plain numbers.
//
// In: plan.txt and the files that it names (little-endian, C order). Out: a Plan, checked for what both runners
// need. Not here: what a backend makes of it. Paths are relative to the working directory.
#pragma once

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace pocketvlm {

constexpr int PLAN_VERSION = 1, MOST_DIMENSIONS = 8;

/// Whatever stops a run; its text is one line for a person.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// Numbers of one type with their shape. `type` is numpy's name of it.
struct Tensor {
    std::string name, type;
    std::vector<int64_t> shape;
    std::vector<uint8_t> bytes;
};

/// One tensor that the decoder hands from step to step, in its full size.
struct State {
    std::string input, output, kind, type;
    std::vector<int64_t> shape;
};

struct Plan {
    std::string backend;
    int threads = 1, warmup = 0, repeats = 1, tokens = 1;
    int64_t context = 0, image_token = -1, next_position = 0, position_rows = 1;
    std::map<std::string, std::string> parts;   // role -> file
    std::vector<std::vector<Tensor>> views;     // of each run of the vision part its inputs
    std::vector<std::string> features;          // the vision part's outputs: features, perhaps deepstack's
    std::string embed_input, embed_output;      // ids -> embeddings
    int64_t hidden = 0, vocabulary = 0;
    std::string deepstack, image_types;         // the decoder's inputs for them; empty: none
    int64_t deepstack_layers = 0;
    std::map<std::string, int> steps;           // further inputs of the decoder -> how many dimensions
    std::vector<State> states;
    std::vector<int64_t> ids, positions;        // (S,) and (position_rows, S)

    const std::string& part(const std::string& role) const {
        const auto found = parts.find(role);
        if (found == parts.end()) throw Error("plan: has no part " + role);
        return found->second;
    }
    bool has(const std::string& role) const { return parts.count(role) > 0; }
};

inline int64_t count_of(const std::vector<int64_t>& shape) {
    int64_t total = 1;
    for (const int64_t size : shape) total *= size;
    return total;
}

inline size_t width_of(const std::string& type) {
    static const std::map<std::string, size_t> widths = {{"float32", 4}, {"float16", 2}, {"int64", 8}, {"int32", 4},
                                                         {"int8", 1},    {"uint8", 1},   {"bool", 1}};
    const auto found = widths.find(type);
    if (found == widths.end()) throw Error("plan: knows no type " + type);
    return found->second;
}

/// A file of exactly `count` numbers. Its size is looked at before there is memory for it.
template <typename Number>
std::vector<Number> read_numbers(const std::string& path, int64_t count) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    if (!file) throw Error(path + ": cannot be read");
    const std::streamoff found = file.tellg();
    if (count < 0 || found % sizeof(Number) || found / static_cast<int64_t>(sizeof(Number)) != count) {
        throw Error(path + ": has " + std::to_string(found) + " bytes, the plan says " + std::to_string(count) +
                    " numbers of " + std::to_string(sizeof(Number)));
    }
    std::vector<Number> numbers(static_cast<size_t>(count));
    file.seekg(0);
    if (count && !file.read(reinterpret_cast<char*>(numbers.data()), found)) throw Error(path + ": cannot be read");
    return numbers;
}

/// The words of one line, each taken in turn; the end of a line that should go on is an error.
class Words {
  public:
    Words(const std::string& line, int number) : stream_(line), number_(number) {}

    std::string text() {
        std::string word;
        if (!(stream_ >> word)) throw Error(where() + ": ends too early");
        return word;
    }

    int64_t integer() {
        const std::string word = text();
        size_t used = 0;
        int64_t value = 0;
        try {
            value = std::stoll(word, &used);
        } catch (const std::exception&) {
            used = 0;
        }
        if (used != word.size()) throw Error(where() + ": wanted a number, got " + word);
        return value;
    }

    std::vector<int64_t> shape() {
        const int64_t count = integer();
        if (count < 0 || count > MOST_DIMENSIONS) throw Error(where() + ": a tensor has too many dimensions");
        std::vector<int64_t> sizes(static_cast<size_t>(count));
        for (int64_t& size : sizes) {
            size = integer();
            if (size < 0) throw Error(where() + ": a size is negative");
        }
        return sizes;
    }

    /// The rest of the line: a path, which may have spaces.
    std::string rest() {
        std::string found;
        std::getline(stream_ >> std::ws, found);
        if (found.empty()) throw Error(where() + ": ends too early");
        return found;
    }

    std::string where() const { return "plan: line " + std::to_string(number_); }

  private:
    std::istringstream stream_;
    int number_;
};

inline Tensor read_tensor(Words& words) {
    Tensor found;
    found.name = words.text();
    found.type = words.text();
    found.shape = words.shape();
    const int64_t bytes = count_of(found.shape) * static_cast<int64_t>(width_of(found.type));
    found.bytes = read_numbers<uint8_t>(words.rest(), bytes);
    return found;
}

/// One line of the plan. What it does not know it refuses: a plan of a later version says so in its first line.
inline void read_line(Plan& plan, const std::string& key, Words& words) {
    if (key == "backend") plan.backend = words.text();
    else if (key == "threads") plan.threads = static_cast<int>(words.integer());
    else if (key == "warmup") plan.warmup = static_cast<int>(words.integer());
    else if (key == "repeats") plan.repeats = static_cast<int>(words.integer());
    else if (key == "tokens") plan.tokens = static_cast<int>(words.integer());
    else if (key == "context") plan.context = words.integer();
    else if (key == "image_token") plan.image_token = words.integer();
    else if (key == "part") {
        const std::string role = words.text();
        plan.parts[role] = words.rest();
    } else if (key == "view") plan.views.emplace_back();
    else if (key == "input") {
        if (plan.views.empty()) throw Error(words.where() + ": an input before its view");
        plan.views.back().push_back(read_tensor(words));
    } else if (key == "feature") plan.features.push_back(words.text());
    else if (key == "embed") {
        plan.embed_input = words.text();
        plan.embed_output = words.text();
    } else if (key == "hidden") plan.hidden = words.integer();
    else if (key == "vocabulary") plan.vocabulary = words.integer();
    else if (key == "deepstack") {
        plan.deepstack = words.text();
        plan.deepstack_layers = words.integer();
    } else if (key == "image_types") plan.image_types = words.text();
    else if (key == "step") {
        const std::string name = words.text();
        plan.steps[name] = static_cast<int>(words.integer());
    } else if (key == "state") {
        State state;
        state.input = words.text();
        state.output = words.text();
        state.kind = words.text();
        state.type = words.text();
        state.shape = words.shape();
        plan.states.push_back(state);
    } else if (key == "ids") {
        const int64_t count = words.integer();
        plan.ids = read_numbers<int64_t>(words.rest(), count);
    } else if (key == "positions") {
        plan.position_rows = words.integer();
        const int64_t count = words.integer();
        plan.positions = read_numbers<int64_t>(words.rest(), plan.position_rows * count);
    } else if (key == "next_position") plan.next_position = words.integer();
    else throw Error(words.where() + ": knows no " + key);
}

inline Plan read_plan(const std::string& path) {
    std::ifstream file(path);
    if (!file) throw Error(path + ": cannot be read");
    Plan plan;
    std::string line;
    for (int number = 1; std::getline(file, line); ++number) {
        Words words(line, number);
        const std::string key = words.text();
        if (number > 1) {
            read_line(plan, key, words);
        } else if (key != "pocketvlm-plan" || words.integer() != PLAN_VERSION) {
            throw Error(path + ": is no plan of version " + std::to_string(PLAN_VERSION));
        }
    }
    const size_t length = plan.ids.size();
    if (!length || plan.positions.size() != length * static_cast<size_t>(plan.position_rows)) {
        throw Error(path + ": has no prompt, or not a position for each of its ids");
    }
    if (plan.tokens < 1 || plan.repeats < 1 || plan.warmup < 0 || plan.threads < 1) {
        throw Error(path + ": wanted 1 or more tokens, repeats and threads");
    }
    if (static_cast<int64_t>(length) + plan.tokens - 1 > plan.context) {
        throw Error(path + ": prompt and answer are longer than the context of " + std::to_string(plan.context));
    }
    return plan;
}

}  // namespace pocketvlm
