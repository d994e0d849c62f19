#include "cpu/scratch.h"

#include <cstdlib>
#include <new>
#include <vector>

namespace fastnn::cpu {
namespace {

constexpr size_t kAlignment = 64;         // a cache line, and an AVX-512 vector
constexpr size_t kKeptBytes = 32u << 20;  // a larger block goes back to the system after its call

struct Block {
  void* data = nullptr;
  size_t bytes = 0;
};

struct Stack {
  std::vector<Block> blocks;
  size_t depth = 0;

  ~Stack() {
    for (Block& block : blocks) std::free(block.data);
  }
};

thread_local Stack stack;

}  // namespace

void* scratch_push(size_t bytes) {
  if (stack.depth == stack.blocks.size()) stack.blocks.emplace_back();
  Block& block = stack.blocks[stack.depth];
  if (block.bytes < bytes) {
    std::free(block.data);
    block = {};
    const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    block.data = rounded < bytes ? nullptr : std::aligned_alloc(kAlignment, rounded);
    if (!block.data) throw std::bad_alloc();
    block.bytes = rounded;
  }
  ++stack.depth;
  return block.data;
}

void scratch_pop() {
  Block& block = stack.blocks[--stack.depth];
  if (block.bytes > kKeptBytes) {
    std::free(block.data);
    block = {};
  }
}

}  // namespace fastnn::cpu
