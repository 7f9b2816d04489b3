// Runs an ONNX bundle (flavour ort-fused) by a plan: vision part, embeddings, decoder with its state in place.
//
// In: a plan of backend onnxruntime, the bundle's parts. Out: the lines of measure.h. It does what
// runtime/onnx_session.py and runtime/onnx_state.py do for one sequence on the CPU; which tensors there are comes
// from the plan, so it knows no family. Not here: what evals/remote/runner_plan.py refuses.
#include <algorithm>
#include <cstring>

#include "measure.h"
#include "ort.h"

namespace {

using namespace pocketvlm;

/// What a step takes besides states: buffers of `length` tokens, values over them.
struct Step {
    std::vector<float> embeds, deepstack;
    std::vector<int64_t> mask, positions, types;
};

class OnnxBackend : public Backend {
  public:
    explicit OnnxBackend(const Plan& plan) : plan_(plan) {
        for (const char* role : {"vision_encoder", "embed_tokens", "decoder"}) plan.part(role);
        if (!plan.steps.count("inputs_embeds") || !plan.steps.count("num_logits_to_keep")) {
            throw Error("plan: the decoder wants no inputs_embeds or no num_logits_to_keep");
        }
        if (plan.hidden < 1 || plan.vocabulary < 1 || plan.features.size() != (plan.deepstack_layers ? 2 : 1)) {
            throw Error("plan: sizes or the vision part's outputs are missing");
        }
        logits_.resize(static_cast<size_t>(plan.vocabulary));
        for (const auto& [role, path] : plan.parts) {
            sessions_.emplace(role, environment_.open(path, plan.threads));
        }
        for (const State& state : plan.states) {
            const size_t bytes = static_cast<size_t>(count_of(state.shape)) * width_of(state.type);
            memory_.emplace_back(state.kind == "conv" ? 2 : 1, std::vector<uint8_t>(bytes));
        }
    }

    void encode() override {
        features_.clear();
        deepstack_.assign(static_cast<size_t>(plan_.deepstack_layers), {});
        for (const std::vector<Tensor>& view : plan_.views) encode(view);
    }

    const float* prefill() override {
        length_ = 0;
        for (size_t i = 0; i < plan_.states.size(); ++i) {  // what a kv state holds is hidden by the mask
            if (plan_.states[i].kind == "conv") std::fill(memory_[i][parity_].begin(), memory_[i][parity_].end(), 0);
        }
        const size_t count = plan_.ids.size();
        Step step = embedded(plan_.ids);
        place_features(step);
        step.positions = plan_.positions;
        return run(count > 1 && plan_.has("decoder_prefill") ? "decoder_prefill" : "decoder", step, count);
    }

    const float* decode(int64_t token, int64_t position) override {
        Step step = embedded({token});
        step.positions.assign(static_cast<size_t>(plan_.position_rows), position);
        return run("decoder", step, 1);
    }

    int64_t vocabulary() const override { return plan_.vocabulary; }

  private:
    OrtSession* session(const std::string& role) const { return sessions_.at(role).get(); }

    void encode(const std::vector<Tensor>& view) {
        ort::Run run;
        std::vector<ort::Value> inputs;
        for (const Tensor& input : view) {
            inputs.push_back(ort::tensor(const_cast<uint8_t*>(input.bytes.data()), input.type, input.shape));
            run.input(input.name, inputs.back().get());
        }
        for (const std::string& name : plan_.features) run.output(name);
        const std::vector<ort::Value> found = run.run(session("vision_encoder"));
        const auto [numbers, size] = ort::floats(found[0].get());
        features_.insert(features_.end(), numbers, numbers + size);
        if (deepstack_.empty()) return;
        const auto [stack, stack_size] = ort::floats(found.at(1).get());
        if (stack_size != size * deepstack_.size()) throw Error("vision_encoder: features and deepstack do not fit");
        for (size_t layer = 0; layer < deepstack_.size(); ++layer) {
            deepstack_[layer].insert(deepstack_[layer].end(), stack + layer * size, stack + (layer + 1) * size);
        }
    }

    /// Embeddings (S, hidden) of ids (S,); zeros where deepstack and image types go.
    Step embedded(std::vector<int64_t> ids) {
        const int64_t count = static_cast<int64_t>(ids.size());
        Step step;
        step.embeds.resize(static_cast<size_t>(count * plan_.hidden));
        const ort::Value input = ort::tensor(ids.data(), "int64", {1, count});
        const ort::Value output = ort::tensor(step.embeds.data(), "float32", {1, count, plan_.hidden});
        ort::Run run;
        run.input(plan_.embed_input, input.get());
        run.output(plan_.embed_output, output.get());
        run.run(session("embed_tokens"));
        step.deepstack.resize(step.embeds.size() * static_cast<size_t>(plan_.deepstack_layers));
        step.types.resize(ids.size());
        return step;
    }

    /// The n-th image token's embedding becomes the n-th row of the features.
    void place_features(Step& step) const {
        const size_t width = static_cast<size_t>(plan_.hidden), count = plan_.ids.size();
        size_t taken = 0;
        for (size_t place = 0; place < count; ++place) {
            if (plan_.ids[place] != plan_.image_token) continue;
            if ((taken + 1) * width > features_.size()) break;
            std::copy_n(&features_[taken * width], width, &step.embeds[place * width]);
            for (size_t layer = 0; layer < deepstack_.size(); ++layer) {
                std::copy_n(&deepstack_[layer][taken * width], width, &step.deepstack[(layer * count + place) * width]);
            }
            step.types[place] = 1;
            ++taken;
        }
        const auto wanted = std::count(plan_.ids.begin(), plan_.ids.end(), plan_.image_token);
        if (taken * width != features_.size() || static_cast<size_t>(wanted) != taken) {
            throw Error("prompt: has " + std::to_string(wanted) + " image tokens, the vision part gave " +
                        std::to_string(features_.size() / width));
        }
    }

    /// Logits (vocabulary,) of the last of `count` new tokens.
    const float* run(const std::string& role, Step& step, size_t count) {
        const int64_t length = static_cast<int64_t>(count), total = length_ + length;
        int64_t one = 1;
        step.mask.assign(static_cast<size_t>(total), 1);
        std::vector<ort::Value> values;
        ort::Run run;
        const auto give = [&](const std::string& name, ort::Value value) {
            run.input(name, value.get());
            values.push_back(std::move(value));
        };
        const auto& steps = plan_.steps;
        const auto name_of = [&](const char* name) -> const std::string& { return steps.find(name)->first; };
        give(name_of("inputs_embeds"), ort::tensor(step.embeds.data(), "float32", {1, length, plan_.hidden}));
        if (steps.count("attention_mask")) {
            give(name_of("attention_mask"), ort::tensor(step.mask.data(), "int64", {1, total}));
        }
        if (steps.count("position_ids")) {
            const std::vector<int64_t> flat{1, length}, rows{plan_.position_rows, 1, length};
            give(name_of("position_ids"),
                 ort::tensor(step.positions.data(), "int64", steps.at("position_ids") == 3 ? rows : flat));
        }
        const std::vector<int64_t> keep(static_cast<size_t>(steps.at("num_logits_to_keep")), 1);
        give(name_of("num_logits_to_keep"), ort::tensor(&one, "int64", keep));
        if (!plan_.deepstack.empty()) {
            give(plan_.deepstack, ort::tensor(step.deepstack.data(), "float32",
                                              {plan_.deepstack_layers, 1, length, plan_.hidden}));
        }
        if (!plan_.image_types.empty()) give(plan_.image_types, ort::tensor(step.types.data(), "int64", {1, length}));
        const std::string logits_name = "logits";
        const ort::Value logits = ort::tensor(logits_.data(), "float32", {1, 1, plan_.vocabulary});
        run.output(logits_name, logits.get());
        add_states(run, values);
        run.run(session(role));
        length_ = total;
        parity_ ^= 1;
        return logits_.data();
    }

    /// A kv state is one buffer for input and output; a conv state has two, which swap.
    void add_states(ort::Run& run, std::vector<ort::Value>& values) {
        for (size_t i = 0; i < plan_.states.size(); ++i) {
            const State& state = plan_.states[i];
            std::vector<std::vector<uint8_t>>& buffers = memory_[i];
            const size_t from = buffers.size() > 1 ? parity_ : 0, to = buffers.size() > 1 ? 1 - parity_ : 0;
            values.push_back(ort::tensor(buffers[from].data(), state.type, state.shape));
            run.input(state.input, values.back().get());
            if (to != from) values.push_back(ort::tensor(buffers[to].data(), state.type, state.shape));
            run.output(state.output, values.back().get());
        }
    }

    const Plan& plan_;
    ort::Environment environment_;
    std::map<std::string, ort::Session> sessions_;
    std::vector<std::vector<std::vector<uint8_t>>> memory_;
    std::vector<float> features_, logits_;
    std::vector<std::vector<float>> deepstack_;
    int64_t length_ = 0;
    size_t parity_ = 0;
};

}  // namespace

int main(int count, char** arguments) {
    const pocketvlm::Open open = [](const pocketvlm::Plan& plan) { return std::make_unique<OnnxBackend>(plan); };
    return pocketvlm::run(count, arguments, "onnxruntime", api_base()->version(), open);
}
