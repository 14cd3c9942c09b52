// The English contractions that patterns keep apart.
#pragma once

namespace tinylm {

// '(?:[sdmt]|ll|ve|re) at the apostrophe `begin` < `end`, or nullptr. Constant time.
inline const char* contraction_end(const char* begin, const char* end) {
  if (end - begin < 2) return nullptr;
  const char first = begin[1];
  if (first == 's' || first == 'd' || first == 'm' || first == 't') return begin + 2;
  if (end - begin < 3) return nullptr;
  const char second = begin[2];
  const bool is_contraction = (first == 'l' && second == 'l') || (first == 'v' && second == 'e') ||
                              (first == 'r' && second == 'e');
  return is_contraction ? begin + 3 : nullptr;
}

// '(?i:[sdmt]|ll|ve|re) at the apostrophe `begin` < `end`, or nullptr. Of these letters, only s has
// a case variant beyond ASCII: the long s, U+017F. Constant time.
inline const char* caseless_contraction_end(const char* begin, const char* end) {
  if (end - begin < 2) return nullptr;
  const char first = begin[1] | 0x20;
  if (first == 's' || first == 'd' || first == 'm' || first == 't') return begin + 2;
  if (end - begin < 3) return nullptr;
  if (begin[1] == '\xC5' && begin[2] == '\xBF') return begin + 3;
  const char second = begin[2] | 0x20;
  const bool is_contraction = (first == 'l' && second == 'l') || (first == 'v' && second == 'e') ||
                              (first == 'r' && second == 'e');
  return is_contraction ? begin + 3 : nullptr;
}

}  // namespace tinylm
