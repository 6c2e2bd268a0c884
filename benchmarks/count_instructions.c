// A plugin of qemu's user mode that counts executed instructions by function: benchmarks/instruction_counts.py.
//
// It needs no header of qemu. The functions declared here are of its plugin interface, version 1
// (https://www.qemu.org/docs/master/devel/tcg-plugins.html), which later versions still load.

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

typedef uint64_t plugin_id;
struct block;
struct instruction;
enum { ADD_UINT64 = 0 };

size_t qemu_plugin_tb_n_insns(const struct block*);
struct instruction* qemu_plugin_tb_get_insn(const struct block*, size_t);
const char* qemu_plugin_insn_symbol(const struct instruction*);
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct block*));
void qemu_plugin_register_vcpu_tb_exec_inline(struct block*, int operation, void* counter, uint64_t added);
void qemu_plugin_register_atexit_cb(plugin_id, void (*)(plugin_id, void*), void*);

int qemu_plugin_version = 1;

struct count {
  const char* function;  // qemu's own copy of the name, or NULL
  uint64_t instructions;
  struct count* next;
};

static struct count* counts;
static const char* path;

static void count_block(plugin_id id, struct block* block) {
  (void)id;
  struct count* count = calloc(1, sizeof(*count));
  if (!count) abort();
  count->function = qemu_plugin_insn_symbol(qemu_plugin_tb_get_insn(block, 0));
  count->next = counts;
  counts = count;
  qemu_plugin_register_vcpu_tb_exec_inline(block, ADD_UINT64, &count->instructions, qemu_plugin_tb_n_insns(block));
}

static void write_counts(plugin_id id, void* unused) {
  (void)id, (void)unused;
  FILE* file = fopen(path, "w");
  if (!file) abort();
  for (struct count* count = counts; count; count = count->next) {
    if (count->instructions) fprintf(file, "%" PRIu64 " %s\n", count->instructions, count->function ? count->function : "?");
  }
  if (fclose(file)) abort();
}

int qemu_plugin_install(plugin_id id, const void* info, int n_arguments, char** arguments) {
  (void)info;
  if (n_arguments != 1) return 1;
  path = arguments[0];  // "out=PATH"
  while (*path && *path++ != '=') continue;
  qemu_plugin_register_vcpu_tb_trans_cb(id, count_block);
  qemu_plugin_register_atexit_cb(id, write_counts, NULL);
  return 0;
}
