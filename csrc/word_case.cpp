#include "word_case.hpp"

#include <memory>

#include "simd/words.hpp"
#include "utf8.hpp"

namespace tinylm {
namespace {

#include "case_tables.inc"

const CaseRecord& case_record(std::uint32_t c) {
  return kCaseRecords[kCaseStage2[kCaseStage1[c / kCaseBlock] * kCaseBlock + c % kCaseBlock]];
}

char* write_expansion(std::uint32_t c, char* out) {
  for (const Expansion& expansion : kExpansions) {
    if (expansion.from != c) continue;
    for (int i = 0; i < expansion.length; ++i) out = encode_utf8(expansion.to[i], out);
  }
  return out;
}

std::unique_ptr<LowerTable> make_lower_table() {
  auto table = std::make_unique<LowerTable>();
  for (std::uint32_t c = 0; c < table->size(); ++c) {
    char bytes[12];
    const char* end = write_lower(c, bytes);
    Lowered& lowered = (*table)[c];
    const bool is_special = c == kCapitalSigma || (case_record(c).flags & kExpands) != 0;
    lowered.size = is_special ? 0 : static_cast<std::uint8_t>(end - bytes);
    std::memcpy(lowered.bytes, bytes, lowered.size);
  }
  return table;
}

}  // namespace

bool is_separator(std::uint32_t c) {
  return c < 0x80 ? kAsciiMap[c] == ' ' : (case_record(c).flags & kSpace) != 0;
}

bool is_cased(std::uint32_t c) { return (case_record(c).flags & kCased) != 0; }

bool is_case_ignorable(std::uint32_t c) { return (case_record(c).flags & kCaseIgnorable) != 0; }

char* write_lower(std::uint32_t c, char* out) {
  if (is_separator(c)) {
    *out = ' ';
    return out + 1;
  }
  const CaseRecord& record = case_record(c);
  if ((record.flags & kExpands) != 0) return write_expansion(c, out);
  return encode_utf8(c + static_cast<std::uint32_t>(record.delta), out);
}

// Made when first asked for: a text in ASCII needs none of its 256 KiB.
const LowerTable& lower_table() {
  static const std::unique_ptr<LowerTable> table = make_lower_table();
  return *table;
}

}  // namespace tinylm
