// Runs a GGUF bundle (text model and mmproj) by a plan, with llama.cpp's own libraries.
//
// In: a plan of backend llama.cpp, the two files. Out: the lines of measure.h. It does what
// runtime/gguf_session.py and runtime/gguf_library.py do for one sequence: pictures come in the size that the vision
// model is to see, prompts as ids; flash attention is on, keys and values are float16. Not here: text.
#include <algorithm>
#include <cstring>

#include "llama.h"
#include "measure.h"
#include "mtmd.h"

#ifndef BACKEND_VERSION
#define BACKEND_VERSION "unknown"
#endif

namespace {

using namespace pocketvlm;

constexpr int32_t MOST_AT_ONCE = 2048, MOST_IMAGE_TOKENS = 1 << 16;
constexpr int64_t MROPE_ROWS = 4;  // time, row, column and one that is not used

template <typename Thing, void (*FREE)(Thing*)>
struct Freed {
    void operator()(Thing* thing) const { FREE(thing); }
};

template <typename Thing, void (*FREE)(Thing*)>
using Owned = std::unique_ptr<Thing, Freed<Thing, FREE>>;

class GgufBackend : public Backend {
  public:
    explicit GgufBackend(const Plan& plan) : plan_(plan) {
        const std::string& text = plan.part("text_model");
        llama_model_params model_parameters = llama_model_default_params();
        model_parameters.n_gpu_layers = 0;
        model_.reset(llama_model_load_from_file(text.c_str(), model_parameters));
        if (!model_) throw Error(text + ": llama.cpp cannot open it");
        llama_context_params parameters = llama_context_default_params();
        parameters.n_ctx = static_cast<uint32_t>(plan.context);
        parameters.n_batch = parameters.n_ubatch = std::min(parameters.n_ctx, static_cast<uint32_t>(MOST_AT_ONCE));
        parameters.n_threads = parameters.n_threads_batch = plan.threads;
        parameters.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        parameters.type_k = parameters.type_v = GGML_TYPE_F16;
        context_.reset(llama_init_from_model(model_.get(), parameters));
        if (!context_) throw Error(text + ": llama.cpp has no memory for " + std::to_string(plan.context) + " tokens");
        width_ = static_cast<size_t>(llama_model_n_embd_inp(model_.get()));
        open_vision(plan.part("mmproj"));
    }

    void encode() override {
        features_.clear();
        for (const std::vector<Tensor>& view : plan_.views) encode(view.at(0));
    }

    const float* prefill() override {
        llama_memory_clear(llama_get_memory(context_.get()), true);
        const size_t length = plan_.ids.size();
        size_t given = 0;
        for (size_t start = 0, end = 0; start < length; start = end) {  // stretches of only text or only pictures
            while (end < length && is_image(end) == is_image(start)) ++end;
            if (!is_image(start)) {
                extend(start, end, nullptr);
                continue;
            }
            const size_t after = given + (end - start);
            if (after * width_ > features_.size()) break;
            extend(start, end, &features_[given * width_]);
            given = after;
        }
        if (given * width_ != features_.size() || given != image_tokens()) {
            throw Error("prompt: has " + std::to_string(image_tokens()) + " image tokens, the vision part gave " +
                        std::to_string(features_.size() / width_));
        }
        return logits();
    }

    const float* decode(int64_t token, int64_t position) override {
        const llama_token id = static_cast<llama_token>(token);
        const llama_pos place = static_cast<llama_pos>(position);
        run(&id, nullptr, &place, 1, 1);
        return logits();
    }

    int64_t vocabulary() const override { return llama_vocab_n_tokens(llama_model_get_vocab(model_.get())); }

  private:
    void open_vision(const std::string& path) {
        mtmd_context_params wanted = mtmd_context_params_default();
        wanted.use_gpu = wanted.print_timings = wanted.warmup = false;
        wanted.n_threads = plan_.threads;
        wanted.image_min_tokens = 1;  // no smallest or largest picture of llama.cpp's own
        wanted.image_max_tokens = MOST_IMAGE_TOKENS;
        wanted.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        vision_.reset(mtmd_init_from_file(path.c_str(), model_.get(), wanted));
        if (!vision_) throw Error(path + ": llama.cpp cannot open it beside the text model");
    }

    bool is_image(size_t place) const { return !plan_.views.empty() && plan_.ids[place] == plan_.image_token; }

    size_t image_tokens() const {
        size_t found = 0;
        for (size_t place = 0; place < plan_.ids.size(); ++place) found += is_image(place);
        return found;
    }

    /// One picture (height, width, 3) in bytes.
    void encode(const Tensor& pixels) {
        if (pixels.type != "uint8" || pixels.shape.size() != 3) throw Error("plan: a view of llama.cpp is bytes, h w 3");
        const Owned<mtmd_bitmap, mtmd_bitmap_free> bitmap(
            mtmd_bitmap_init(static_cast<uint32_t>(pixels.shape[1]), static_cast<uint32_t>(pixels.shape[0]),
                             pixels.bytes.data()));
        const char* marker = mtmd_default_marker();
        const mtmd_input_text text{marker, std::strlen(marker), false, true};
        const Owned<mtmd_input_chunks, mtmd_input_chunks_free> chunks(mtmd_input_chunks_init());
        const mtmd_bitmap* bitmaps[] = {bitmap.get()};
        if (mtmd_tokenize(vision_.get(), chunks.get(), &text, bitmaps, 1)) {
            throw Error("mmproj: llama.cpp cannot cut the picture");
        }
        const mtmd_input_chunk* image = nullptr;  // where llama.cpp also cuts tiles, the whole picture is the last
        for (size_t i = 0; i < mtmd_input_chunks_size(chunks.get()); ++i) {
            const mtmd_input_chunk* chunk = mtmd_input_chunks_get(chunks.get(), i);
            if (mtmd_input_chunk_get_type(chunk) == MTMD_INPUT_CHUNK_TYPE_IMAGE) image = chunk;
        }
        if (!image || mtmd_encode_chunk(vision_.get(), image)) throw Error("mmproj: llama.cpp cannot encode the picture");
        const float* found = mtmd_get_output_embd(vision_.get());
        features_.insert(features_.end(), found, found + mtmd_input_chunk_get_n_tokens(image) * width_);
    }

    /// Places start to end of the prompt; `embeds` of its image tokens, or null for text.
    void extend(size_t start, size_t end, const float* embeds) {
        const size_t length = plan_.ids.size();
        const bool is_mrope = embeds && plan_.position_rows > 1;
        const int64_t rows = is_mrope ? MROPE_ROWS : 1;
        for (size_t from = start; from < end; from += MOST_AT_ONCE) {
            const size_t count = std::min(end - from, static_cast<size_t>(MOST_AT_ONCE));
            std::vector<llama_token> ids(plan_.ids.begin() + static_cast<long>(from),
                                         plan_.ids.begin() + static_cast<long>(from + count));
            std::vector<llama_pos> places(count * static_cast<size_t>(rows));
            for (size_t row = 0; row < static_cast<size_t>(std::min(rows, plan_.position_rows)); ++row) {
                for (size_t i = 0; i < count; ++i) {
                    places[row * count + i] = static_cast<llama_pos>(plan_.positions[row * length + from + i]);
                }
            }
            run(ids.data(), embeds ? embeds + (from - start) * width_ : nullptr, places.data(), count, rows);
        }
    }

    /// One batch: ids, or embeddings in their place; logits of the last.
    void run(const llama_token* ids, const float* embeds, const llama_pos* places, size_t count, int64_t rows) {
        const int32_t size = static_cast<int32_t>(count);
        llama_batch batch =
            llama_batch_init(size * static_cast<int32_t>(rows), embeds ? static_cast<int32_t>(width_) : 0, 1);
        batch.n_tokens = size;
        if (embeds) std::copy_n(embeds, count * width_, batch.embd);
        else std::copy_n(ids, count, batch.token);
        std::copy_n(places, count * static_cast<size_t>(rows), batch.pos);
        for (size_t i = 0; i < count; ++i) {
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = i + 1 == count;
        }
        const int32_t status = llama_decode(context_.get(), batch);
        llama_batch_free(batch);
        if (status) throw Error("llama.cpp: decode of " + std::to_string(count) + " tokens failed (" +
                                std::to_string(status) + ")");
    }

    const float* logits() const { return llama_get_logits_ith(context_.get(), -1); }

    const Plan& plan_;
    Owned<llama_model, llama_model_free> model_;
    Owned<llama_context, llama_free> context_;
    Owned<mtmd_context, mtmd_free> vision_;
    std::vector<float> features_;  // (image tokens, width), deepstack's behind each token's
    size_t width_ = 0;
};

void keep_silent(ggml_log_level, const char*, void*) {}

}  // namespace

int main(int count, char** arguments) {
    llama_log_set(keep_silent, nullptr);
    mtmd_log_set(keep_silent, nullptr);
    llama_backend_init();
    const pocketvlm::Open open = [](const pocketvlm::Plan& plan) { return std::make_unique<GgufBackend>(plan); };
    return pocketvlm::run(count, arguments, "llama.cpp", BACKEND_VERSION, open);
}
