// keys and values of h -> cache;  queries of executed tokens -> core.h -> o;  merged with the forecast
#pragma once

#include "core.h"

namespace ir::cpu::IR_LEVEL {

// (bias) -> (norm of each head, or of all) -> rotary; y is [heads, head_dim] of one token.
template <typename T, typename W>
inline void rotate(const Attention<T, W>& unit, int64_t token, int64_t heads, const T* bias, const T* norm, bool whole, float* y) {
  const int64_t width = unit.head_dim, half = unit.rotary_dim / 2;
  const float epsilon = unit.contribution.epsilon;
  add_row(bias, heads * width, y);
  if (whole) rms_norm(norm, heads * width, epsilon, y);
  const T *cos = unit.cos + token * half, *sin = unit.sin + token * half;
  for (int64_t head = 0; head < heads; ++head, y += width) {
    if (!whole) rms_norm(norm, width, epsilon, y);
    for (int64_t i = 0; i < half; ++i) {
      const float c = to_float(cos[i]), s = to_float(sin[i]), a = y[i], b = y[i + half];
      y[i] = a * c - b * s;
      y[i + half] = b * c + a * s;
    }
  }
}

// The present as the past leaves it: the same memory, or a copy.
template <typename T, typename W>
inline void copy_past(const Attention<T, W>& unit, const Threads& threads) {
  const size_t bytes = static_cast<size_t>(unit.past_slots * unit.head_dim) * sizeof(T);
  for (int part = 0; part < 2; ++part) {
    if (bytes == 0 || unit.past[part] == unit.present[part]) continue;
    threads.each(unit.batch * unit.kv_heads, [&](int64_t head) {
      std::memcpy(unit.present[part] + head * unit.slots * unit.head_dim,
                  unit.past[part] + head * unit.past_slots * unit.head_dim, bytes);
    });
  }
}

// Writes the keys and values of these tokens into the present.
template <typename T, typename W>
inline void append(const Attention<T, W>& unit, const Rows& rows, const Threads& threads) {
  const int64_t width = unit.kv_heads * unit.head_dim, step = 2 * width, start = unit.total - unit.sequence;
  chunks(rows.count, [&](int64_t first, int64_t count) {
    const int64_t* tokens = rows.tokens + first;
    const auto h = [&](int64_t r) { return unit.h + tokens[r] * unit.width; };
    const auto* blocks = gather<W>(count, unit.width, h, threads);
    float* result = scratch(Use::kResult, kChunk * step);
    const int64_t each = panels(unit.kv[0]);
    threads.each(2 * each, [&](int64_t panel) {
      const int64_t part = panel / each;
      multiply_into(blocks, count, unit.kv[part], panel % each, result + part * width, step);
    });
    threads.each(count, [&](int64_t r) {
      float* y = result + r * step;
      rotate(unit, tokens[r], unit.kv_heads, unit.kv_bias[0], unit.k_norm, unit.k_norm_whole, y);
      add_row(unit.kv_bias[1], width, y + width);
      const int64_t sequence = tokens[r] / unit.sequence, slot = start + tokens[r] % unit.sequence;
      for (int64_t head = 0; head < unit.kv_heads; ++head) {
        const int64_t to = ((sequence * unit.kv_heads + head) * unit.slots + slot) * unit.head_dim;
        for (int part = 0; part < 2; ++part)
          narrow(y + part * width + head * unit.head_dim, unit.head_dim, unit.present[part] + to);
      }
    });
  });
}

// A strict cache: approximated tokens leave zeros, and slots whose keys are zero in every head are seen by no query.
template <typename T, typename W>
inline const bool* keep_executed(const Attention<T, W>& unit, const Threads& threads) {
  bool* kept = scratch<bool>(Use::kKept, unit.batch * unit.total);
  threads.each(unit.batch, [&](int64_t sequence) {
    for (int64_t slot = 0; slot < unit.total; ++slot) {
      bool& keep = kept[sequence * unit.total + slot];
      const int64_t token = slot - (unit.total - unit.sequence);
      const bool empty = token >= 0 && unit.execute != nullptr && !unit.execute[sequence * unit.sequence + token];
      keep = false;
      for (int64_t head = 0; head < unit.kv_heads && (empty || !keep); ++head) {
        const int64_t at = ((sequence * unit.kv_heads + head) * unit.slots + slot) * unit.head_dim;
        for (int64_t i = 0; i < unit.head_dim && (empty || !keep); ++i) {
          if (empty) unit.present[0][at + i] = unit.present[1][at + i] = T{};
          keep = !empty && to_float(unit.present[0][at + i]) != 0.0F;
        }
      }
    }
  });
  return kept;
}

// Groups of queries in `tokens`: (first place, sequence, offset, count), for every key/value head the same.
struct Block {
  int64_t place, sequence, offset, count;
};

inline int64_t group_queries(const int64_t* tokens, int64_t count, int64_t sequence, int64_t shared, Block* blocks) {
  int64_t found = 0;
  for (int64_t first = 0, end = 0; first < count; first = end) {
    while (end < count && tokens[end] / sequence == tokens[first] / sequence) ++end;
    for (int64_t query = 0; query < (end - first) * shared; query += kColumns, ++found)
      blocks[found] = {first, tokens[first] / sequence, query, least((end - first) * shared - query, int64_t{kColumns})};
  }
  return found;
}

template <typename T, typename W>
inline void attention(const Attention<T, W>& unit, const Threads& threads) {
  const int64_t tokens = unit.batch * unit.sequence, heads = unit.heads, width = heads * unit.head_dim;
  keep_forecasts(unit.contribution, unit.execute, tokens, unit.width);
  copy_past(unit, threads);
  append(unit, executed(unit.strict ? unit.execute : nullptr, tokens, Use::kExecuted), threads);
  const bool* kept = unit.strict ? keep_executed(unit, threads) : nullptr;
  const Rows rows = executed(unit.execute, tokens, Use::kExecuted);
  const int64_t shared = heads / unit.kv_heads;

  chunks(rows.count, [&](int64_t first, int64_t count) {
    const int64_t* places = rows.tokens + first;
    const auto h = [&](int64_t r) { return unit.h + places[r] * unit.width; };
    const auto* blocks = gather<W>(count, unit.width, h, threads);
    float* queries = scratch(Use::kQueries, kChunk * width);
    threads.each(panels(unit.q), [&](int64_t panel) { multiply_into(blocks, count, unit.q, panel, queries, width); });
    auto* ranges = scratch<Range>(Use::kRanges, kChunk);
    threads.each(count, [&](int64_t r) {
      rotate(unit, places[r], heads, unit.q_bias, unit.q_norm, unit.q_norm_whole, queries + r * width);
      ranges[r] = visible(unit.mask + places[r] * unit.total, unit.total);
    });

    float* attended = scratch(Use::kAttended, kChunk * width);
    auto* groups = scratch<Block>(Use::kBlocks, (kChunk * shared + kColumns - 1) / kColumns + count);
    const int64_t each = group_queries(places, count, unit.sequence, shared, groups);
    threads.each(unit.kv_heads * each, [&](int64_t task) {
      const int64_t head = task / each;
      const Block& block = groups[task % each];
      const int64_t at = (block.sequence * unit.kv_heads + head) * unit.slots * unit.head_dim, to = block.place * width;
      attend(unit, Group<T>{queries + to, ranges + block.place, places + block.place, block.offset, block.count, head * shared,
                            shared, unit.present[0] + at, unit.present[1] + at,
                            kept == nullptr ? nullptr : kept + block.sequence * unit.total, attended + to});
    });

    const auto rows_of = [&](int64_t r) { return attended + r * width; };
    const auto* out = gather<W>(count, width, rows_of, threads);
    float* result = scratch(Use::kResult, kChunk * unit.width);
    threads.each(panels(unit.o), [&](int64_t panel) { multiply_into(out, count, unit.o, panel, result, unit.width); });
    contribute(unit.contribution, places, count, unit.width, result, threads);
  });
}

}  // namespace ir::cpu::IR_LEVEL
