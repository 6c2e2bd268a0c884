// Speed and memory of a MobileMoE's decoder on the processor at hand, without a runtime or a library beside this file.
//
//   device_bench MODEL [--threads N] [--kernel NAME] [--prompt TOKENS] [--answer TOKENS] [--repetitions N]
//                      [--tokens FILE] [--logits FILE]
//
// MODEL: a shape, or a shape with weights (model_file.h). The prompt is computed at once, and the answer token by token.
// Its tokens are given and not chosen, so that every repetition reads the same experts. A first run is not counted.
// --tokens: prompt and answer, as numbers in a text file; random ones otherwise.
// --logits: receives the logits after the prompt and after every token of the answer, float32.
// Prints one line of JSON; docs/on_device.md says what is in it. Ends with 2 where an argument or a file is wrong.

#include <chrono>
#include <fstream>

#include "decoder.h"
#include "tile_kernels.h"

using namespace mobilemoe;

namespace {

// More threads than a processor has; a system may refuse a process that many.
constexpr int64_t kMostThreads = 1024;

struct Options {
  std::string model, kernel = fastest_kernel().name, tokens, logits;
  int64_t threads = 1, prompt = 128, answer = 32, repetitions = 3;
};

int64_t read_count(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const int64_t value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end || value < 1 || value > (int64_t{1} << 20)) refuse(name + " " + text + ": give 1 to 1048576");
  return value;
}

Options read_options(int n, char** arguments) {
  Options options;
  std::map<std::string, std::string*> texts = {
      {"--kernel", &options.kernel}, {"--tokens", &options.tokens}, {"--logits", &options.logits}};
  std::map<std::string, int64_t*> counts = {{"--threads", &options.threads}, {"--prompt", &options.prompt},
                                            {"--answer", &options.answer}, {"--repetitions", &options.repetitions}};
  if (n < 2 || n % 2) refuse("device_bench MODEL [--OPTION VALUE ...]; the source's first lines have the options");
  options.model = arguments[1];
  for (int i = 2; i < n; i += 2) {
    const std::string name = arguments[i];
    if (texts.count(name)) {
      *texts[name] = arguments[i + 1];
    } else if (counts.count(name)) {
      *counts[name] = read_count(name, arguments[i + 1]);
    } else {
      refuse(name + ": no such option");
    }
  }
  return options;
}

std::vector<int64_t> read_tokens(const Options& options, int64_t vocabulary) {
  const size_t n = options.prompt + options.answer;
  std::vector<int64_t> tokens;
  if (options.tokens.empty()) {
    uint64_t state = 1;
    while (tokens.size() < n) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      tokens.push_back(static_cast<int64_t>((state >> 33) % vocabulary));
    }
    return tokens;
  }
  std::ifstream file(options.tokens);
  for (int64_t token; file >> token;) {
    if (token < 0 || token >= vocabulary) refuse(options.tokens + ": token " + std::to_string(token) + " is none");
    tokens.push_back(token);
  }
  if (tokens.size() != n) {
    refuse(options.tokens + ": has " + std::to_string(tokens.size()) + " tokens; --prompt and --answer need " +
           std::to_string(n));
  }
  return tokens;
}

// Returns the bytes of weights that a token of the answer reads: K experts of each layer, all other matrices, and a row
// of the embedding.
int64_t count_weight_bytes(const Model& model) {
  const int64_t D = model.shape.D;
  int64_t sum = (value_bytes(D) + D / model.shape.embedding_group_size * kScaleBytes) / kTileRows;
  for (const Part& part : model.parts) sum += part.bytes() / part.copies * std::min(part.copies, model.shape.K);
  return sum;
}

// The most memory that was resident so far: weights that were read from a mapped file count too.
int64_t read_peak_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmHWM:", 0) == 0) return std::strtoll(line.c_str() + 6, nullptr, 10) * 1024;
  }
  return 0;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double find_median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return (values[n / 2] + values[(n - 1) / 2]) / 2;
}

}  // namespace

int main(int n_arguments, char** arguments) {
  const Options options = read_options(n_arguments, arguments);
  const TileKernel kernel = find_kernel(options.kernel.c_str());
  if (!kernel) refuse("--kernel " + options.kernel + ": this processor does not have it");
  if (options.threads > kMostThreads) refuse("--threads: at most " + std::to_string(kMostThreads));
  ThreadPool pool(static_cast<int>(options.threads));
  const auto opened = std::chrono::steady_clock::now();
  const Model model = open_model(options.model.c_str(), pool);
  const double load_seconds = seconds_since(opened);
  const std::vector<int64_t> tokens = read_tokens(options, model.shape.vocabulary);
  std::ofstream logits_file;
  if (!options.logits.empty()) logits_file.open(options.logits, std::ios::binary);
  const auto keep = [&](const std::vector<float>& logits) {
    logits_file.write(reinterpret_cast<const char*>(logits.data()), sizeof(float) * logits.size());
  };

  Decoder decoder(model, kernel, pool, options.prompt + options.answer);
  std::vector<double> prefill, decode;
  for (int64_t i = 0; i <= options.repetitions; ++i) {
    auto start = std::chrono::steady_clock::now();
    const std::vector<float>& logits = decoder.forward(tokens.data(), options.prompt, 0);
    if (i) prefill.push_back(seconds_since(start));
    if (!i && logits_file.is_open()) keep(logits);
    start = std::chrono::steady_clock::now();
    for (int64_t t = options.prompt; t < options.prompt + options.answer; ++t) {
      decoder.forward(&tokens[t], 1, t);
      if (!i && logits_file.is_open()) keep(logits);
    }
    if (i) decode.push_back(seconds_since(start));
  }
  logits_file.close();
  if (!options.logits.empty() && !logits_file) refuse(options.logits + ": cannot be written");

  const int64_t weight_bytes_a_token = count_weight_bytes(model);
  const double decode_speed = options.answer / find_median(decode);
  const double cache_bytes =
      static_cast<double>(decoder.cache_bytes_a_position()) * (options.prompt + (options.answer + 1) / 2.0);
  std::printf(
      "{\"kernel\": \"%s\", \"threads\": %lld, \"weights\": \"%s\", \"prompt\": %lld, \"answer\": %lld, "
      "\"load_seconds\": %.3f, \"prefill_tokens_per_second\": %.3f, \"decode_tokens_per_second\": %.3f, "
      "\"weight_bytes_a_token\": %lld, \"cache_bytes_a_token\": %.0f, \"decode_bytes_per_second\": %.0f, "
      "\"weight_bytes\": %lld, \"peak_bytes\": %lld}\n",
      options.kernel.c_str(), static_cast<long long>(options.threads), model.is_random ? "random" : "given",
      static_cast<long long>(options.prompt), static_cast<long long>(options.answer), load_seconds,
      options.prompt / find_median(prefill), decode_speed, static_cast<long long>(weight_bytes_a_token), cache_bytes,
      decode_speed * (static_cast<double>(weight_bytes_a_token) + cache_bytes),
      static_cast<long long>(model.weight_bytes), static_cast<long long>(read_peak_bytes()));
}
