// CPU loops of `noising`, compiled once per instruction set (for_each_isa.h).
namespace CDM_ISA {

using namespace cdm;

constexpr int64_t kChunk = 1024;  // elements whose random numbers are drawn at once; they fit the cache
constexpr int64_t kPixels = 256;  // the same for images with channels last, per channel

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Normal numbers of elements first .. first + count - 1 of a draw; both are multiples of 4.
static void draw_normals(const PhiloxKey& key, int64_t first, int32_t count, float* out) {
    const uint32_t block = static_cast<uint32_t>(first / 4);
#pragma omp simd
    for (int32_t j = 0; j < count / 4; ++j) {
        const Philox4 words = philox_block(key, kNoise, block + static_cast<uint32_t>(j));
        const NormalPair low = box_muller(words.x, words.y), high = box_muller(words.z, words.w);
        out[4 * j] = low.x;
        out[4 * j + 1] = low.y;
        out[4 * j + 2] = high.x;
        out[4 * j + 3] = high.y;
    }
}

static void draw_uniforms(const PhiloxKey& key, int64_t first, int32_t count, float* out) {
    const uint32_t block = static_cast<uint32_t>(first / 4);
#pragma omp simd
    for (int32_t j = 0; j < count / 4; ++j) {
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

// The entry of a table for the level of an image; NaN for a level out of range.
template <typename Compute>
static Compute at_level(const NoisingArguments& p, const void* table, int64_t image) {
    const int64_t level = p.level[image];
    const bool known = level >= 0 && level < p.num_levels;
    return known ? static_cast<const Compute*>(table)[level] : static_cast<Compute>(__builtin_nan(""));
}

template <typename In, typename Out, typename Compute>
static void noising_chunk(const NoisingArguments& p, const PhiloxKey& key, int64_t first, int64_t last) {
    alignas(64) float normal[kChunk], uniform[kChunk];
    alignas(64) Compute clean[kChunk];
    if (p.eps_given == nullptr) draw_normals(key, first, kChunk, normal);
    if (p.scale != 0.0f) draw_uniforms(key, first, kChunk, uniform);

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
        const Compute a_t = at_level<Compute>(p, p.a, image), s_t = at_level<Compute>(p, p.s, image);
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

// Images with channels last: kPixels pixels of one image at a time, `group` channels of them. Random
// numbers are drawn in contiguous order, in which those of one channel are neighbours.

static inline int64_t pixel_tiles(const NoisingArguments& p) {
    return (p.image_size / p.channels + kPixels - 1) / kPixels;
}

// Splits interleaved channels: pixels [begin, end) of one image, mirrored or not, in `out`, kPixels a
// channel.
template <int group, typename In, typename Compute>
static void load_pixels(const In* image, int64_t channels, int64_t begin, int64_t end, int64_t row,
                        bool mirrored, Compute* out) {
    const int64_t step = group == 1 ? channels : group;
    if (!mirrored) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i)
            for (int c = 0; c < group; ++c)
                out[c * kPixels + i - begin] = static_cast<Compute>(widen(image[i * step + c]));
        return;
    }
    for (int64_t start = begin - begin % row; start < end; start += row) {
        const int64_t last = smaller(row, end - start);
#pragma omp simd
        for (int64_t column = larger(0, begin - start); column < last; ++column)
            for (int c = 0; c < group; ++c)
                out[c * kPixels + start + column - begin] =
                    static_cast<Compute>(widen(image[(start + row - 1 - column) * step + c]));
    }
}

// The inverse of load_pixels: interleaves the channels in `values`.
template <int group, typename T>
static void store_pixels(const T* values, int64_t channels, int64_t size, T* out) {
    const int64_t step = group == 1 ? channels : group;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i)
        for (int c = 0; c < group; ++c) out[i * step + c] = values[c * kPixels + i];
}

// `group` is 1, or the number of channels.
template <int group, typename In, typename Out, typename Compute>
static void noising_pixels(const NoisingArguments& p, const PhiloxKey& key, int64_t image, int64_t begin) {
    alignas(64) float drawn[kPixels + 4];
    alignas(64) Compute clean[group * kPixels], eps[group * kPixels];
    alignas(64) Out x_t[group * kPixels];
    const int64_t plane = p.image_size / p.channels, end = smaller(plane, begin + kPixels);
    const int64_t size = end - begin;
    const bool mirrored = p.flip && philox_flip(key, image);
    const Compute a_t = at_level<Compute>(p, p.a, image), s_t = at_level<Compute>(p, p.s, image);
    for (int64_t channel = 0; channel < p.channels; channel += group) {
        const int64_t start = image * p.image_size + channel;  // in memory
        const int64_t place = start + begin * p.channels;
        load_pixels<group>(static_cast<const In*>(p.x0) + start, p.channels, begin, end, p.row, mirrored,
                           clean);
        if (p.eps_given != nullptr)
            load_pixels<group>(static_cast<const Compute*>(p.eps_given) + place, p.channels, 0, size, p.row,
                               false, eps);
        for (int c = 0; c < group; ++c) {
            Compute* x = clean + c * kPixels;
            Compute* e = eps + c * kPixels;
            const int64_t number = image * p.image_size + (channel + c) * plane + begin;
            const int64_t ahead = number % 4;
            const int32_t count = static_cast<int32_t>((ahead + size + 3) / 4 * 4);
            if (p.scale != 0.0f) {
                draw_uniforms(key, number - ahead, count, drawn);
#pragma omp simd
                for (int64_t i = 0; i < size; ++i)
                    x[i] = dequantised(static_cast<float>(x[i]), drawn[ahead + i], p.scale);
            }
            if (p.eps_given == nullptr) {
                draw_normals(key, number - ahead, count, drawn);
#pragma omp simd
                for (int64_t i = 0; i < size; ++i) e[i] = static_cast<Compute>(drawn[ahead + i]);
            }
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) narrow(noised(a_t, x[i], s_t, e[i]), x_t + c * kPixels + i);
        }
        store_pixels<group>(x_t, p.channels, size, static_cast<Out*>(p.x_t) + place);
        if (p.eps_given == nullptr)
            store_pixels<group>(eps, p.channels, size, static_cast<Compute*>(p.eps_drawn) + place);
        if (p.x0_out != nullptr)
            store_pixels<group>(clean, p.channels, size, static_cast<Compute*>(p.x0_out) + place);
    }
}

template <typename In, typename Out, typename Compute>
static void noising_channels_last(const NoisingArguments& p, int64_t first_tile, int64_t last_tile) {
    const PhiloxKey key = p.seed == nullptr ? PhiloxKey{} : philox_key(p.seed[0], p.seed[1]);
    const int64_t tiles = pixel_tiles(p);
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
        const int64_t image = tile / tiles, begin = tile % tiles * kPixels;
        if (p.channels == 3)
            noising_pixels<3, In, Out, Compute>(p, key, image, begin);
        else
            noising_pixels<1, In, Out, Compute>(p, key, image, begin);
    }
}

}  // namespace CDM_ISA
