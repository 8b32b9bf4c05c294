// CPU loops of `noising`, compiled once per instruction set (for_each_isa.h).
namespace CDM_ISA {

using namespace cdm;

constexpr int64_t kChunk = 1024;  // elements whose random numbers are drawn at once: they stay in cache

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Normal numbers of elements first .. first + kChunk - 1 of a draw; first is a multiple of 4.
static void draw_normals(const PhiloxKey& key, int64_t first, float* out) {
    const uint32_t block = static_cast<uint32_t>(first / 4);
#pragma omp simd
    for (int32_t j = 0; j < kChunk / 4; ++j) {
        const Philox4 words = philox_block(key, kNoise, block + static_cast<uint32_t>(j));
        const NormalPair low = box_muller(words.x, words.y), high = box_muller(words.z, words.w);
        out[4 * j] = low.x;
        out[4 * j + 1] = low.y;
        out[4 * j + 2] = high.x;
        out[4 * j + 3] = high.y;
    }
}

static void draw_uniforms(const PhiloxKey& key, int64_t first, float* out) {
    const uint32_t block = static_cast<uint32_t>(first / 4);
#pragma omp simd
    for (int32_t j = 0; j < kChunk / 4; ++j) {
        const Philox4 words = philox_block(key, kDequantisation, block + static_cast<uint32_t>(j));
        out[4 * j] = uniform_of(words.x);
        out[4 * j + 1] = uniform_of(words.y);
        out[4 * j + 2] = uniform_of(words.z);
        out[4 * j + 3] = uniform_of(words.w);
    }
}

// Elements [begin, end) of one image, numbered within the image; buffers hold them from index 0.
template <typename In, typename Compute>
static void load_image(const In* image, int64_t begin, int64_t end, int64_t row, bool mirrored,
                       Compute* out) {
    if (!mirrored) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) out[i - begin] = static_cast<Compute>(widen(image[i]));
        return;
    }
    for (int64_t start = begin - begin % row; start < end; start += row) {
        const int64_t last = smaller(row, end - start);
#pragma omp simd
        for (int64_t column = larger(0, begin - start); column < last; ++column)
            out[start + column - begin] = static_cast<Compute>(widen(image[start + row - 1 - column]));
    }
}

template <typename In, typename Out, typename Compute>
static void noising_chunk(const NoisingArguments& p, const PhiloxKey& key, int64_t first, int64_t last) {
    alignas(64) float normal[kChunk], uniform[kChunk];
    alignas(64) Compute clean[kChunk];
    if (p.eps_given == nullptr) draw_normals(key, first, normal);
    if (p.scale != 0.0f) draw_uniforms(key, first, uniform);

    for (int64_t image = first / p.image_size; image * p.image_size < last; ++image) {
        const int64_t start = image * p.image_size;
        const int64_t begin = larger(first, start), end = smaller(last, start + p.image_size);
        const int64_t size = end - begin, drawn = begin - first;
        const bool mirrored = p.flip && philox_flip(key, image);
        load_image(static_cast<const In*>(p.x0) + start, begin - start, end - start, p.row, mirrored, clean);
        if (p.scale != 0.0f) {
#pragma omp simd
            for (int64_t i = 0; i < size; ++i)
                clean[i] = dequantised(static_cast<float>(clean[i]), uniform[drawn + i], p.scale);
        }
        const int64_t level = p.level[image];
        const bool known = level >= 0 && level < p.num_levels;
        const Compute nan = static_cast<Compute>(__builtin_nan(""));
        const Compute a_t = known ? static_cast<const Compute*>(p.a)[level] : nan;
        const Compute s_t = known ? static_cast<const Compute*>(p.s)[level] : nan;
        Out* x_t = static_cast<Out*>(p.x_t) + begin;
        if (p.eps_given != nullptr) {
            const Compute* eps = static_cast<const Compute*>(p.eps_given) + begin;
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) narrow(noised(a_t, clean[i], s_t, eps[i]), x_t + i);
        } else {
            Compute* eps = static_cast<Compute*>(p.eps_drawn) + begin;
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) {
                eps[i] = static_cast<Compute>(normal[drawn + i]);
                narrow(noised(a_t, clean[i], s_t, static_cast<Compute>(normal[drawn + i])), x_t + i);
            }
        }
        if (p.x0_out != nullptr)
            std::memcpy(static_cast<Compute*>(p.x0_out) + begin, clean, size * sizeof(Compute));
    }
}

template <typename In, typename Out, typename Compute>
static void noising_range(const NoisingArguments& p, int64_t first_chunk, int64_t last_chunk) {
    const PhiloxKey key = p.seed == nullptr ? PhiloxKey{} : philox_key(p.seed[0], p.seed[1]);
    for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk)
        noising_chunk<In, Out, Compute>(p, key, chunk * kChunk, smaller(p.size, (chunk + 1) * kChunk));
}

}  // namespace CDM_ISA
