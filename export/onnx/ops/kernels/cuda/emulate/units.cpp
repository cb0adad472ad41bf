// The units on the host, for tests: a call is a struct of mlp.cuh or attention.cuh, whose layout no type changes.
#include "../attention.cuh"
#include "../decide.cuh"
#include "../mlp.cuh"

namespace {

using namespace ir::cuda;

// Every buffer lies by itself, just as large as asked for, and is NaN at first.
struct Poisoned : Scratch {
  std::vector<void*> all;

  void allocate(size_t count, const size_t* bytes, void** buffers) override {
    for (size_t i = 0; i < count; ++i) {
      all.push_back(buffers[i] = std::malloc(bytes[i]));
      if (bytes[i] > 0) std::memset(buffers[i], 0xFF, bytes[i]);
    }
  }
  ~Poisoned() override {
    for (void* buffer : all) std::free(buffer);
  }
};

template <template <typename> class Call, typename Run>
const char* run(int type, int multiprocessors, int order, bool capturing, const void* call, Run&& unit) {
  static std::string message;
  emulate::block().order = static_cast<emulate::Order>(order);
  emulate::capturing = capturing;
  Poisoned scratch;
  const Device device{nullptr, multiprocessors, scratch};
  try {
    if (type == 0) unit(device, *static_cast<const Call<float>*>(call));
    if (type == 1) unit(device, *static_cast<const Call<Half>*>(call));
    if (type == 2) unit(device, *static_cast<const Call<BFloat16>*>(call));
    return nullptr;
  } catch (const Failure& failure) {
    message = failure.what();
    return message.c_str();
  }
}

}  // namespace

// These return what failed, or null.
extern "C" const char* emulate_decide(int type, int multiprocessors, int order, bool capturing, const void* call) {
  return run<Decide>(type, multiprocessors, order, capturing, call, [](auto&... x) { decide(x...); });
}
extern "C" const char* emulate_mlp(int type, int multiprocessors, int order, bool capturing, const void* call) {
  return run<Mlp>(type, multiprocessors, order, capturing, call, [](auto&... x) { mlp(x...); });
}
extern "C" const char* emulate_attention(int type, int multiprocessors, int order, bool capturing, const void* call) {
  return run<Attention>(type, multiprocessors, order, capturing, call, [](auto&... x) { attention(x...); });
}
extern "C" size_t emulate_decide_bytes() { return sizeof(Decide<float>); }
extern "C" size_t emulate_mlp_bytes() { return sizeof(Mlp<float>); }
extern "C" size_t emulate_attention_bytes() { return sizeof(Attention<float>); }
