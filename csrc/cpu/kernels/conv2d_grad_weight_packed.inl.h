// Weight gradient of a convolution with at least a vector of input channels, which fill their vectors.
//
//   grad_w[o][t][i] = sum over images, y, x of grad[y][x][o] * source[y * stride + tap_y[t]][x * stride + tap_x[t]][i]
//
// The register tile's rows are output channels, its columns input channels, its depth the output pixels of a unit: some
// rows of an image, or several small images. Both factors are packed a unit at a time, since pixels as they lie are
// often a power of two apart, where a strip of some channels fits a few sets of L1 alone:
//
//   source   [image][row][column][kTileColumns]         one panel, in L1; every tap is an offset into it
//   grad     [tile][image][row][column][rows of a tile]
//
// Where a packed number would enter few products - one tap, few channels - both are read as they lie.
//
// The border is not packed: under each tap, the sum leaves out the output pixels whose source lies outside the image.
// The sums are OHWI as they are made: no transposition follows. Units are cut into chunks and both kinds of channels
// into parts by the shape alone, and the chunks' sums are added in order: the same bits for every thread count.
#pragma once

#include "cpu/kernels/conv2d_gather.inl.h"
#include "cpu/kernels/conv2d_pack.inl.h"
#include "cpu/simd/streaming.h"

namespace fastnn::cpu {
namespace {

// Pixels of a unit: 128 pixels x 32 channels of source are 16 KiB, half of L1. Half as many where there is one tap:
// what the next unit needs is fetched meanwhile, and rows that two units share are no reason for large ones.
constexpr int64_t kPackedPixels = 128;
constexpr int64_t kPackedPixelsOfOneTap = 64;
// A chunk is worth its own sums, which have to be added to the others', from this many units on.
constexpr int64_t kPackedChunkUnits = 8;

// The source pixels that these outputs meet; where there is one tap, only those.
inline PixelSpan source_pixels(const ConvAxis& axis, int64_t low, int64_t outs) {
  if (axis.kernel == 1) {
    const PixelSpan inside = outputs_inside(axis, 0, low, outs);
    return {inside.first * axis.stride - axis.padding, axis.stride, inside.count};
  }
  int64_t first = low * axis.stride - axis.padding;
  int64_t end = first + (outs - 1) * axis.stride + (axis.kernel - 1) * axis.dilation + 1;
  if (first < 0) first = 0;
  if (end > axis.size) end = axis.size;
  return {first, 1, end > first ? end - first : 0};
}

// Source pixels of `outs` outputs, at most.
inline int64_t most_source_pixels(const ConvAxis& axis, int64_t outs) {
  if (axis.kernel == 1) return outs;
  const int64_t reach = (outs - 1) * axis.stride + (axis.kernel - 1) * axis.dilation + 1;
  return reach < axis.size ? reach : axis.size;
}

struct PackedPlan {
  ConvAxis vertical, horizontal;
  int64_t images, rows;  // of a unit: rows of one image, or all rows of several
  int64_t units_per_image, units, chunks;
  int64_t group_parts, input_parts, output_parts;  // tasks of a chunk
};

template <class T, int most_rows>
PackedPlan packed_plan(const Conv2dShape& s) {
  PackedPlan plan{};
  plan.vertical = vertical_axis(s), plan.horizontal = horizontal_axis(s);
  const int64_t pixels = s.out_height * s.out_width;
  const int64_t of_unit = kernel_taps(s) == 1 ? kPackedPixelsOfOneTap : kPackedPixels;
  plan.images = pixels < of_unit ? (of_unit + pixels - 1) / pixels : 1;
  if (plan.images > s.batch) plan.images = s.batch;
  plan.units_per_image = plan.images > 1 ? 1 : (pixels + of_unit - 1) / of_unit;
  if (plan.units_per_image > s.out_height) plan.units_per_image = s.out_height;
  plan.rows = (s.out_height + plan.units_per_image - 1) / plan.units_per_image;
  plan.units_per_image = (s.out_height + plan.rows - 1) / plan.rows;
  plan.units = (s.batch + plan.images - 1) / plan.images * plan.units_per_image;

  const int64_t inputs = group_inputs(s), outputs = group_outputs(s);
  const int64_t bytes = weight_elements(s) * static_cast<int64_t>(sizeof(T));
  plan.chunks = plan.units / kPackedChunkUnits;
  if (plan.chunks > kTasks) plan.chunks = kTasks;
  if (plan.chunks > kMaxPartialBytes / bytes) plan.chunks = kMaxPartialBytes / bytes;
  if (plan.chunks < 1) plan.chunks = 1;

  // Every part of the inputs packs the gradient anew and the other way round: the longer side is halved first.
  plan.group_parts = plan.input_parts = plan.output_parts = 1;
  const int64_t panels = panels_of<T>(inputs), tiles = (outputs + most_rows - 1) / most_rows;
  while (plan.chunks * plan.group_parts * plan.input_parts * plan.output_parts < kTasks) {
    if (2 * plan.group_parts <= s.groups)
      plan.group_parts *= 2;
    else if (inputs / plan.input_parts > outputs / plan.output_parts && 2 * plan.input_parts <= panels)
      plan.input_parts *= 2;
    else if (2 * plan.output_parts <= tiles)
      plan.output_parts *= 2;
    else
      break;
  }
  return plan;
}

// A unit: output rows [row, row + rows) of images [image, image + images).
struct PackedUnit {
  int64_t image, images, row, rows;
};

inline PackedUnit packed_unit(const Conv2dShape& s, const PackedPlan& plan, int64_t unit) {
  const int64_t image = unit / plan.units_per_image * plan.images, row = unit % plan.units_per_image * plan.rows;
  return {image, s.batch - image < plan.images ? s.batch - image : plan.images, row,
          s.out_height - row < plan.rows ? s.out_height - row : plan.rows};
}

// How pixels of a factor lie: those of `rows` and `columns` of each image, so many elements apart.
struct PackedLayout {
  PixelSpan rows, columns;
  int64_t image, row, pixel;
};

// The pixels that one tap's products sum over: where they begin, and the steps from one to the next, in elements of
// either factor.
struct PackedRuns {
  struct Place {
    int64_t begin, image, row, pixel;
  };
  int64_t images, rows, width;
  Place source, grad;

  void join_neighbours() {
    if (source.row != width * source.pixel || grad.row != width * grad.pixel) return;
    width *= rows, rows = 1;
    if (source.image != width * source.pixel || grad.image != width * grad.pixel) return;
    width *= images, images = 1;
  }
};

// Of each tap.
inline void packed_runs(const Conv2dShape& s, const PackedPlan& plan, const PackedUnit& unit,
                        const PackedLayout& source, const PackedLayout& grad, PackedRuns* runs) {
  for (int64_t ky = 0; ky < s.kernel_height; ++ky) {
    const PixelSpan y = outputs_inside(plan.vertical, ky, unit.row, unit.rows);
    const int64_t source_y = y.first * s.stride_height - s.padding_height + ky * s.dilation_height - source.rows.first;
    for (int64_t kx = 0; kx < s.kernel_width; ++kx, ++runs) {
      const PixelSpan x = outputs_inside(plan.horizontal, kx, 0, s.out_width);
      const int64_t source_x =
          x.first * s.stride_width - s.padding_width + kx * s.dilation_width - source.columns.first;
      *runs = {unit.images,
               y.count,
               x.count,
               {source_y / source.rows.step * source.row + source_x / source.columns.step * source.pixel, source.image,
                s.stride_height / source.rows.step * source.row, s.stride_width / source.columns.step * source.pixel},
               {(y.first - grad.rows.first) * grad.row + x.first * grad.pixel, grad.image, grad.row, grad.pixel}};
      runs->join_neighbours();
    }
  }
}

// sums[r][column] = or += sum over pixels of grad[pixel][r] * source[pixel][column], for `rows` output channels.
template <class T, int rows, int vectors>
void packed_product(const PackedRuns& runs, const T* grad, const T* source, bool first, int64_t columns, T* sums,
                    int64_t sums_stride) {
  Vec<T> acc[rows][vectors]{};
  for (int64_t image = 0; image < runs.images; ++image) {
    for (int64_t y = 0; y < runs.rows; ++y) {
      const T* a = grad + runs.grad.begin + image * runs.grad.image + y * runs.grad.row;
      const T* b = source + runs.source.begin + image * runs.source.image + y * runs.source.row;
      for (int64_t x = 0; x < runs.width; ++x, a += runs.grad.pixel, b += runs.source.pixel) {
        Vec<T> values[vectors];
        FASTNN_UNROLL
        for (int v = 0; v < vectors; ++v) values[v] = load(b + v * kLanes<T>);
        FASTNN_UNROLL
        for (int r = 0; r < rows; ++r) {
          const Vec<T> g = broadcast(a[r]);
          FASTNN_UNROLL
          for (int v = 0; v < vectors; ++v) acc[r][v] += g * values[v];
        }
      }
    }
  }
  FASTNN_UNROLL
  for (int r = 0; r < rows; ++r) {
    FASTNN_UNROLL
    for (int v = 0; v < vectors; ++v) {
      T* to = sums + r * sums_stride + v * kLanes<T>;
      const int64_t left = columns - v * kLanes<T> < kLanes<T> ? columns - v * kLanes<T> : kLanes<T>;
      store_upto(to, first ? acc[r][v] : load_upto(to, left) + acc[r][v], left);
    }
  }
}

// Time of a tile's products with so many columns in all: of 8 for two vectors, a single one takes 5, since its products
// wait for loads.
template <class T>
inline int64_t packed_column_time(int64_t columns) {
  const int64_t vectors = (columns + kLanes<T> - 1) / kLanes<T>;
  return vectors / 2 * 8 + vectors % 2 * 5;
}

// Outer products have the output channels for columns. They are the faster ones where these fill vectors better than
// the input channels do, by more than the border's products cost, which they make. They read both factors as they lie,
// and so does a 1x1 kernel here whose input channels fill whole vectors.
template <class T>
inline bool packed_serves_grad_weight(const Conv2dShape& s) {
  const int64_t inputs = group_inputs(s), outputs = group_outputs(s), taps = kernel_taps(s);
  if (inputs < kLanes<T>) return false;
  if ((taps == 1 && inputs % kLanes<T> == 0) || outputs % kLanes<T> != 0) return true;
  const int64_t packed = packed_column_time<T>(inputs) * outputs * products_inside(s);
  const int64_t outer = packed_column_time<T>(outputs) * inputs * taps * s.out_height * s.out_width;
  return 10 * outer > 9 * packed;
}

// Packing is worth its time from this many products to a packed number on: it takes the larger part of the time, the
// more products a cycle makes.
#if defined(__AVX512F__)
constexpr int64_t kPackedProducts = 128;
#else
constexpr int64_t kPackedProducts = 80;
#endif

// Whether the factors are packed. As it lies, a source can be read in whole vectors of its channels alone.
template <class T>
inline bool packs_grad_weight(const Conv2dShape& s) {
  const int64_t inputs = group_inputs(s), outputs = group_outputs(s);
  const int64_t products = s.groups > 1 ? kPackedProducts / 4 * 3 : kPackedProducts;  // a group's pixels are far apart
  return kernel_taps(s) * inputs * outputs > products * (inputs + outputs) || inputs % kLanes<T> != 0;
}

// What a task sums: panels [first_panel, end_panel) of source channels and tiles [first_tile, end_tile) of grad
// channels of each of its groups.
struct PackedPart {
  int64_t first_group, end_group, first_panel, end_panel, first_tile, end_tile;
};

// Both factors, how far apart strips of their copies are, and elements of all strips.
template <class T>
struct PackedFactors {
  const T *source, *grad;
  bool pack, fetch;  // whether they are copied, and while one group is, the next one's numbers are fetched
  int64_t source_strip, grad_strip, source_elements, grad_elements;
};

// sums = or += what a unit of one group adds to them; `packed` holds the copies.
template <class T, int most_rows>
void packed_unit_of_group(const Conv2dShape& s, const PackedPlan& plan, const PackedFactors<T>& factors,
                          const PackedUnit& unit, const PackedPart& part, int64_t group, T* packed, PackedRuns* runs,
                          const FetchAhead<T>& next_source, const FetchAhead<T>& next_grad, bool first, T* sums) {
  const int64_t inputs = group_inputs(s), outputs = group_outputs(s), taps = kernel_taps(s);
  const int64_t first_input = part.first_panel * kTileColumns<T>, first_output = part.first_tile * most_rows;
  const int64_t end_input = part.end_panel * kTileColumns<T> < inputs ? part.end_panel * kTileColumns<T> : inputs;
  const int64_t end_output = part.end_tile * most_rows < outputs ? part.end_tile * most_rows : outputs;
  // The first panel and the first tile, and how far it is to the next ones.
  const T* unit_source =
      factors.source + unit.image * s.in_height * s.in_width * s.in_channels + group * inputs + first_input;
  const T* unit_grad =
      factors.grad + unit.image * s.out_height * s.out_width * s.out_channels + group * outputs + first_output;
  int64_t next_panel = kTileColumns<T>, next_tile = most_rows;
  PackedLayout source_layout{{0, 1, s.in_height},
                             {0, 1, s.in_width},
                             s.in_height * s.in_width * s.in_channels,
                             s.in_width * s.in_channels,
                             s.in_channels};
  PackedLayout grad_layout{{0, 1, s.out_height},
                           {0, 1, s.out_width},
                           s.out_height * s.out_width * s.out_channels,
                           s.out_width * s.out_channels,
                           s.out_channels};
  if (factors.pack) {
    T* sources = packed;
    T* grads = packed + factors.source_elements;
    const PixelSpan rows = source_pixels(plan.vertical, unit.row, unit.rows);
    const PixelSpan columns = source_pixels(plan.horizontal, 0, s.out_width);
    const int64_t row_elements = columns.count * kTileColumns<T>;
    for (int64_t i = 0; i < unit.images * rows.count; ++i) {
      const int64_t row = i / rows.count * s.in_height + rows.first + i % rows.count * rows.step;
      pack_strips<T, kTileColumns<T>>(columns.count, unit_source + (row * s.in_width + columns.first) * s.in_channels,
                                      columns.step * s.in_channels, end_input - first_input, sources + i * row_elements,
                                      factors.source_strip, factors.fetch ? inputs : 0);
    }
    pack_strips<T, most_rows>(unit.images * unit.rows * s.out_width,
                              unit_grad + unit.row * s.out_width * s.out_channels, s.out_channels,
                              end_output - first_output, grads, factors.grad_strip, factors.fetch ? outputs : 0);
    unit_source = sources, next_panel = factors.source_strip;
    unit_grad = grads, next_tile = factors.grad_strip;
    source_layout = {rows, columns, rows.count * row_elements, row_elements, kTileColumns<T>};
    grad_layout = {{unit.row, 1, unit.rows},
                   {0, 1, s.out_width},
                   unit.rows * s.out_width * most_rows,
                   s.out_width * most_rows,
                   most_rows};
  }
  packed_runs(s, plan, unit, source_layout, grad_layout, runs);
  const int64_t tiles = part.end_tile - part.first_tile;
  for (int64_t panel = part.first_panel; panel < part.end_panel; ++panel) {
    const int64_t column = panel * kTileColumns<T>;
    const int64_t width = inputs - column < kTileColumns<T> ? inputs - column : kTileColumns<T>;
    const T* panel_source = unit_source + (panel - part.first_panel) * next_panel;
    for (int64_t tile = part.first_tile; tile < part.end_tile; ++tile) {
      const int64_t output = tile * most_rows;
      const int64_t share = (panel - part.first_panel) * tiles + tile - part.first_tile;
      next_source.fetch(share, (part.end_panel - part.first_panel) * tiles);
      next_grad.fetch(share, (part.end_panel - part.first_panel) * tiles);
      const T* tile_grad = unit_grad + (tile - part.first_tile) * next_tile;
      with_count<most_rows>(outputs - output < most_rows ? outputs - output : most_rows, [&](auto constant) {
        constexpr int count = decltype(constant)::value;
        for (int64_t tap = 0; tap < taps; ++tap) {
          T* to = sums + ((group * outputs + output) * taps + tap) * inputs + column;
          if (most_rows > kTileRows || width <= kLanes<T>)
            packed_product<T, count, 1>(runs[tap], tile_grad, panel_source, first, width, to, taps * inputs);
          else
            packed_product<T, count, 2>(runs[tap], tile_grad, panel_source, first, width, to, taps * inputs);
        }
      });
    }
  }
}

template <class T, int most_rows>
void packed_grad_weight_of_rows(const Conv2dShape& s, const T* source, const T* grad, T* grad_weight) {
  const PackedPlan plan = packed_plan<T, most_rows>(s);
  const int64_t inputs = group_inputs(s), outputs = group_outputs(s);
  const int64_t panels = panels_of<T>(inputs), tiles = (outputs + most_rows - 1) / most_rows;
  const int64_t elements = weight_elements(s);
  const bool in_place = plan.chunks == 1 && is_ohwi(s);

  // Strips are two cache lines further apart than they are long, or all of them would meet in the same sets of L1.
  const int64_t source_pixels_most =
      most_source_pixels(plan.vertical, plan.rows) * most_source_pixels(plan.horizontal, s.out_width);
  PackedFactors<T> factors{
      .source = source,
      .grad = grad,
      .pack = packs_grad_weight<T>(s),
      .fetch = s.groups > 1 && worth_fetching<T>(s.batch * s.in_height * s.in_width * s.in_channels),
      .source_strip = plan.images * source_pixels_most * kTileColumns<T> + 2 * kLanes<T>,
      .grad_strip = plan.images * plan.rows * s.out_width * most_rows + 2 * kLanes<T>,
      .source_elements = 0,
      .grad_elements = 0,
  };
  factors.source_elements = (panels + plan.input_parts - 1) / plan.input_parts * factors.source_strip;
  factors.grad_elements = (tiles + plan.output_parts - 1) / plan.output_parts * factors.grad_strip;
  const ThreadScratch<T> packed(max_threads(), factors.pack ? factors.source_elements + factors.grad_elements : 0);
  const ThreadScratch<PackedRuns> tables(max_threads(), kernel_taps(s));
  const Scratch<T> partials(in_place ? 0 : plan.chunks * elements);

  const int64_t parts = plan.group_parts * plan.input_parts * plan.output_parts;
  parallel_tasks(plan.chunks * parts, [&](int64_t task, int thread) {
    const int64_t chunk = task / parts, group_part = task % parts / (plan.input_parts * plan.output_parts);
    const int64_t input_part = task / plan.output_parts % plan.input_parts, output_part = task % plan.output_parts;
    const PackedPart part{s.groups * group_part / plan.group_parts, s.groups * (group_part + 1) / plan.group_parts,
                          panels * input_part / plan.input_parts,   panels * (input_part + 1) / plan.input_parts,
                          tiles * output_part / plan.output_parts,  tiles * (output_part + 1) / plan.output_parts};
    T* sums = in_place ? grad_weight : partials + chunk * elements;
    const int64_t first_unit = plan.units * chunk / plan.chunks, end_unit = plan.units * (chunk + 1) / plan.chunks;
    for (int64_t index = first_unit; index < end_unit; ++index) {
      FetchAhead<T> next_source{}, next_grad{};  // what the next unit reads, where that is all channels
      if (parts == 1 && s.groups == 1 && index + 1 < end_unit) {
        const PackedUnit after = packed_unit(s, plan, index + 1);
        const PixelSpan after_rows = source_pixels(plan.vertical, after.row, after.rows);
        const int64_t image_rows = (after.images - 1) * s.in_height + (after_rows.count - 1) * after_rows.step + 1;
        next_source = {source + (after.image * s.in_height + after_rows.first) * s.in_width * s.in_channels,
                       image_rows * s.in_width * s.in_channels};
        next_grad = {grad + (after.image * s.out_height + after.row) * s.out_width * s.out_channels,
                     after.images * after.rows * s.out_width * s.out_channels};
      }
      for (int64_t group = part.first_group; group < part.end_group; ++group) {
        packed_unit_of_group<T, most_rows>(s, plan, factors, packed_unit(s, plan, index), part, group, packed[thread],
                                           tables[thread], next_source, next_grad, index == first_unit, sums);
      }
    }
  });
  if (in_place) return;
  write_ohwi_gradient<T>(s, s.out_channels, plan.chunks, elements, partials, grad_weight);
}

template <class T>
void packed_grad_weight(const Conv2dShape& s, const T* source, const T* grad, T* grad_weight) {
  const bool one_vector = group_inputs(s) <= kLanes<T>;
  const auto& of_rows =
      one_vector ? packed_grad_weight_of_rows<T, kRowsOfVectors<1>> : packed_grad_weight_of_rows<T, kRowsOfVectors<2>>;
  of_rows(s, source, grad, grad_weight);
}

}  // namespace
}  // namespace fastnn::cpu
