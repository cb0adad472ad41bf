// The attention core: queries of executed tokens over the cache, each over the slots that its row of the mask shows.
//
// Queries that share keys, of several tokens and of the query heads of one key/value head, are a group, and lie side by side
// in the lanes of vectors. A group goes through the slots that any of them sees, a block at a time, with the softmax's
// maximum and sum carried along.
#pragma once

#include "rows.h"

namespace ir::cpu::IR_LEVEL {

inline constexpr int64_t kSlots = 96;    // of a block: a multiple of kRows
inline constexpr int kFew = kLanes / 2;  // up to so many queries are taken for themselves, not as lanes

// What a token sees: slots first .. end - 1, all of them or, with gaps, those that the mask shows.
struct Range {
  int64_t first, end;
  bool gaps;
};

inline Range visible(const bool* mask, int64_t total) {
  Range range{0, total, false};
  while (range.end > 0 && !mask[range.end - 1]) --range.end;
  while (range.first < range.end && !mask[range.first]) ++range.first;
  int64_t seen = 0;
  for (int64_t i = range.first; i < range.end; ++i) seen += mask[i] ? 1 : 0;
  range.gaps = seen != range.end - range.first;
  return range;
}

// Queries of one sequence, and the keys and values of one head.
template <typename T>
struct Group {
  const float* queries;   // [tokens, heads, head_dim], of the first query's token
  const Range* ranges;    // of the same tokens
  const int64_t* tokens;  // which tokens of all they are
  int64_t offset, count;  // query i is head (offset + i) % shared of token (offset + i) / shared
  int64_t head, shared;   // the first query head, and how many share the keys
  const T *keys, *values;  // [slots, head_dim]
  const bool* kept;        // [total]: which slots hold a key at all; null: all
  float* attended;         // as queries
};

// Slots `first` on of a cache as float32 [count, step], filled up with zeros.
template <typename T>
inline const float* block_of(const T* cache, int64_t first, int64_t count, int64_t width, int64_t step, Use use) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (width == step) return cache + first * width;
  }
  float* copy = scratch(use, kSlots * step);
  for (int64_t i = 0; i < count; ++i) {
    widen(cache + (first + i) * width, width, copy + i * step);
    for (int64_t n = width; n < step; ++n) copy[i * step + n] = 0.0F;
  }
  return copy;
}

// sums[rows, step] += weights * values, where weights[slot * a_step + row * a_row]
inline void accumulate(int64_t slots, int64_t rows, const float* weights, int64_t a_row, int64_t a_step, const float* values,
                       int64_t step, float* sums) {
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t count = block_rows(rows, row);
    const float* a = weights + row * a_row;
    int64_t n = 0;
    for (; n + kColumns <= step; n += kColumns)
      tile_of<2>(count)(slots, a, a_row, a_step, values + n, step, sums + row * step + n, step, true);
    if (n < step) tile_of<1>(count)(slots, a, a_row, a_step, values + n, step, sums + row * step + n, step, true);
  }
}

inline const float kHidden = -__builtin_inff();

// scores[q * step + i] = scale * (query q . key i); the queries lie side by side.
template <int Q>
inline void few_scores(const float* queries, const float* keys, int64_t slots, int64_t width, float scale, float* scores,
                       int64_t step) {
  for (int64_t i = 0; i < slots; ++i, keys += width) {
    Vector sums[Q] = {};
    int64_t k = 0;
    for (; k + kLanes <= width; k += kLanes) {
      const Vector key = load(keys + k);
      fetch<kLanes * 4>(keys + k, kAhead);
      for (int q = 0; q < Q; ++q) sums[q] += load(queries + q * width + k) * key;
    }
    for (int q = 0; q < Q; ++q) {
      float total = sum(sums[q]);
      for (int64_t rest = k; rest < width; ++rest) total += queries[q * width + rest] * keys[rest];
      scores[q * step + i] = total * scale;
    }
  }
}

// One query's scores of the slots that its token sees become the softmax's numerators; returns their sum, 0 where it sees none.
template <typename T, typename W>
inline float soften(const Attention<T, W>& unit, const Group<T>& group, int64_t place, float* row) {
  const Range range = group.ranges[place];
  const int64_t count = range.end - range.first;
  const bool* mask = range.gaps ? unit.mask + group.tokens[place] * unit.total + range.first : nullptr;
  const bool* kept = group.kept == nullptr ? nullptr : group.kept + range.first;
  for (int64_t i = count; i % kLanes != 0; ++i) row[i] = 0.0F;
  if (unit.softcap != 0.0F)
    for (int64_t i = 0; i < count; i += kLanes)
      store(row + i, all(unit.softcap) * tanh(load(row + i) / all(unit.softcap)));
  if (mask != nullptr || kept != nullptr)
    for (int64_t i = 0; i < count; ++i)
      if ((mask != nullptr && !mask[i]) || (kept != nullptr && !kept[i])) row[i] = kHidden;
  for (int64_t i = count; i % kLanes != 0; ++i) row[i] = kHidden;
  Vector highest = all(kHidden), shares{};
  for (int64_t i = 0; i < count; i += kLanes) highest = larger(highest, load(row + i));
  const float peak = largest(highest);
  const Vector base = all(peak == kHidden ? 0.0F : peak);  // for one that sees nothing any number does
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vector p = exp(load(row + i) - base);
    store(row + i, p);
    shares += p;
  }
  return sum(shares);
}

// Q queries of one token, from `query` on: a score for each slot first, then one softmax over all.
template <int Q, typename T, typename W>
inline void attend_few(const Attention<T, W>& unit, const Group<T>& group, int64_t query) {
  const int64_t width = unit.head_dim, step = up_to(width, kLanes);
  const int64_t place = (group.offset + query) / group.shared, head = group.head + (group.offset + query) % group.shared;
  const Range range = group.ranges[place];
  const float* queries = group.queries + (place * unit.heads + head) * width;
  const int64_t count = range.end - range.first, room = up_to(most<int64_t>(count, kSlots), kLanes);
  float* scores = scratch(Use::kScores, Q * room);
  for (int64_t first = 0; first < count; first += kSlots) {
    const int64_t slots = least(kSlots, count - first);
    const float* keys = block_of(group.keys, range.first + first, slots, width, width, Use::kKeys);
    few_scores<Q>(queries, keys, slots, width, unit.scale, scores + first, room);
  }
  float wholes[Q];
  for (int q = 0; q < Q; ++q) wholes[q] = soften(unit, group, place, scores + q * room);
  float* sums = scratch(Use::kSums, Q * step);
  for (int64_t n = 0; n < Q * step; ++n) sums[n] = 0.0F;
  for (int64_t first = 0; first < count; first += kSlots) {
    const int64_t slots = least(kSlots, count - first);
    const float* values = block_of(group.values, range.first + first, slots, width, step, Use::kValues);
    accumulate(slots, Q, scores + first, room, 1, values, step, sums);
  }
  for (int q = 0; q < Q; ++q) {
    float* out = group.attended + (place * unit.heads + head + q) * width;
    for (int64_t n = 0; n < width; ++n) out[n] = wholes[q] == 0.0F ? 0.0F : sums[q * step + n] / wholes[q];
  }
}

// Up to N vectors of queries.
template <int N, typename T, typename W>
inline void attend_lanes(const Attention<T, W>& unit, const Group<T>& group) {
  constexpr int64_t lanes = N * kLanes;
  const int64_t width = unit.head_dim, step = up_to(width, kLanes);
  float* turned = scratch(Use::kTurned, width * lanes);  // the queries, [width, lanes]
  float* sums = scratch(Use::kSums, lanes * step);
  float* scores = scratch(Use::kScores, kSlots * lanes);
  float firsts[lanes], ends[lanes];  // slots as floats: exact, up to 2^24 of them
  Range range{unit.total, 0, false};
  for (int64_t i = 0; i < lanes; ++i) {
    const bool used = i < group.count;
    const int64_t place = (group.offset + i) / group.shared, head = group.head + (group.offset + i) % group.shared;
    const float* q = group.queries + (place * unit.heads + head) * width;
    for (int64_t k = 0; k < width; ++k) turned[k * lanes + i] = used ? q[k] * unit.scale : 0.0F;
    const Range seen = used ? group.ranges[place] : Range{0, 0, false};
    firsts[i] = static_cast<float>(seen.first);
    ends[i] = static_cast<float>(seen.end);
    if (!used) continue;
    range = {least(range.first, seen.first), most(range.end, seen.end), range.gaps || seen.gaps};
  }
  for (int64_t n = 0; n < group.count * step; ++n) sums[n] = 0.0F;
  Vector peaks[N], shares[N];
  for (int v = 0; v < N; ++v) peaks[v] = all(kHidden), shares[v] = Vector{};

  for (int64_t first = range.first; first < range.end; first += kSlots) {
    const int64_t slots = least(kSlots, range.end - first);
    const float* keys = block_of(group.keys, first, slots, width, width, Use::kKeys);
    for (int64_t row = 0; row < slots; row += kRows)
      tile_of<N>(block_rows(slots, row))(width, keys + row * width, width, 1, turned, lanes, scores + row * lanes, lanes, false);

    Vector higher[N], factors[N];
    for (int v = 0; v < N; ++v) {
      const Vector from = load(firsts + v * kLanes), to = load(ends + v * kLanes);
      Vector highest = peaks[v];
      for (int64_t i = 0; i < slots; ++i) {
        float* row = scores + i * lanes + v * kLanes;
        Vector s = load(row);
        if (unit.softcap != 0.0F) s = all(unit.softcap) * tanh(s / all(unit.softcap));
        const Vector slot = all(static_cast<float>(first + i));
        s = ((slot >= from) & (slot < to)) ? s : all(kHidden);
        if (range.gaps) {
          for (int64_t lane = 0; lane < least<int64_t>(kLanes, group.count - v * kLanes); ++lane) {
            const int64_t place = (group.offset + v * kLanes + lane) / group.shared;
            if (!unit.mask[group.tokens[place] * unit.total + first + i]) s[lane] = kHidden;
          }
        }
        if (group.kept != nullptr && !group.kept[first + i]) s = all(kHidden);
        store(row, s);
        highest = larger(highest, s);
      }
      higher[v] = highest > all(kHidden) ? highest : Vector{};  // who sees nothing yet: any number does
      factors[v] = exp(peaks[v] - higher[v]);
      peaks[v] = highest;
      shares[v] *= factors[v];
      for (int64_t i = 0; i < slots; ++i) {
        float* row = scores + i * lanes + v * kLanes;
        const Vector p = exp(load(row) - higher[v]);
        store(row, p);
        shares[v] += p;
      }
    }
    for (int64_t i = 0; i < group.count; ++i) {
      const float factor = factors[i / kLanes][i % kLanes];
      if (factor == 1.0F) continue;
      for (int64_t n = 0; n < step; n += kLanes) store(sums + i * step + n, load(sums + i * step + n) * all(factor));
    }
    const float* values = block_of(group.values, first, slots, width, step, Use::kValues);
    accumulate(slots, group.count, scores, 1, lanes, values, step, sums);
  }
  for (int64_t i = 0; i < group.count; ++i) {
    const int64_t place = (group.offset + i) / group.shared, head = group.head + (group.offset + i) % group.shared;
    const float share = shares[i / kLanes][i % kLanes];
    float* out = group.attended + (place * unit.heads + head) * width;
    for (int64_t n = 0; n < width; ++n) out[n] = share == 0.0F ? 0.0F : sums[i * step + n] / share;
  }
}

// The first queries of a group from `query` on that are of one token; returns the next one.
template <int Q = kFew, typename T, typename W>
inline int64_t attend_token(const Attention<T, W>& unit, const Group<T>& group, int64_t query) {
  const int64_t left = least(group.count - query, group.shared - (group.offset + query) % group.shared);
  if constexpr (Q > 1) {
    if (left < Q) return attend_token<Q - 1>(unit, group, query);
  }
  attend_few<Q>(unit, group, query);
  return query + Q;
}

template <typename T, typename W>
inline void attend(const Attention<T, W>& unit, const Group<T>& group) {
  if (group.count <= kFew) {
    for (int64_t query = 0; query < group.count;) query = attend_token(unit, group, query);
  } else if (group.count <= kLanes) {
    attend_lanes<1>(unit, group);
  } else {
    attend_lanes<2>(unit, group);
  }
}

}  // namespace ir::cpu::IR_LEVEL
