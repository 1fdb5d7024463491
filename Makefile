# GoldFinch in CUDA C. `make help` lists targets and variables.

MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := train
.DELETE_ON_ERROR:
.PHONY: help train infer train_goldfinch infer_goldfinch test_goldfinch test cache-table clean

define HELP
make [train]           build ./train_goldfinch: for the GPU if nvcc and a GPU (sm_80 or newer) are here, else the CPU
make infer             build ./infer_goldfinch
make test_goldfinch    build ./test_goldfinch, the checks; run it alone or with golden tables: ./test_goldfinch FILE...
make test              build all, run ./test_goldfinch and the scripts dev/test*.sh
make dev/NAME          build one program of the kernel lab (dev/README.md), bench_infer (inference in figures) or
                       fuzz (damaged files for every reader)
make cache-table       print how large the caches of the paper's models are, from 1 k to 1 M tokens
make clean             remove what was built (not out/ and data/)

GPU=0                  the same kernels on the CPU; needs g++ only, no CUDA toolkit (dev/cpu/README.md)
GPU=1                  a GPU build even if there is no GPU here
PRECISION=BF16|FP32    storage of weights and activations; default BF16 on a GPU, FP32 on the CPU
GPU_ARCH=90            the GPU's architecture, or several: "80 90"; default: this machine's, or 80 and 90 without a GPU
CUDA=FOLDER            the toolkit to build with; default: that of the nvcc on the PATH, or /usr/local/cuda
SANITIZE=address,undefined   CPU build that stops at the first out-of-bounds access or undefined operation
DEBUG=1                CPU build for stepping through kernels in gdb
NCCL=FOLDER            where NCCL is, for several GPUs, if it is not found; NCCL=0: a build for one GPU
MARCH=native           whose instructions a CPU build may use, as g++ names it; MARCH= for any CPU of the kind
NVCC=, CXX=, CC=       other compilers: CXX=clang++ CC=clang, or a cross compiler with MARCH=

Each combination has its own folder in build/; the programs here at the top are those that were asked for last.
endef

# the kernel lab: every file there that includes dev/common.h
LAB := $(patsubst dev/%.cu,%,$(shell grep -l '^#include "common.h"' dev/*.cu))
DEV := $(LAB) bench_infer fuzz

ifneq ($(filter clean help,$(MAKECMDGOALS)),)
clean:
	rm -rf build train_goldfinch infer_goldfinch test_goldfinch $(DEV:%=dev/%)
help:
	$(info $(HELP))
	@:
else

# ----------------------------------------------------------------------------------------------------------------------
# GPU or CPU?

ifeq ($(origin CXX),default)
CXX := g++
endif
ifeq ($(origin NVCC),undefined)
  ifneq ($(CUDA),)
    NVCC := $(wildcard $(CUDA)/bin/nvcc)
    ifeq ($(NVCC),)
      $(error CUDA=$(CUDA): expected bin/nvcc in this folder, found none)
    endif
  else
    NVCC := $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
  endif
endif

ifneq ($(filter cache-table,$(MAKECMDGOALS)),)
PRECISION ?= BF16
endif
ifneq ($(GPU),0)
# Of each GPU here, as nvidia-smi says it: new-90, or old-61, or junk where it says something else
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d ' \r' | \
    awk -F. '{ print /^[0-9]+[.][0-9]$$/ ? ($$1 >= 8 ? "new-" : "old-") $$1 $$2 : "junk" }' | sort -t - -k 2 -nu)
FOUND := $(patsubst new-%,%,$(filter new-%,$(GPUS)))
OLD := $(patsubst old-%,sm_%,$(filter old-%,$(GPUS)))
endif
ifeq ($(GPU),)
  ifeq ($(NVCC),)
    override GPU := 0
    WHY := no nvcc on the PATH
  else ifneq ($(FOUND),)
    override GPU := 1
    WHY := nvcc and a GPU are here$(if $(OLD), ($(OLD) beside it: older than sm_80))
  else ifneq ($(OLD),)
    override GPU := 0
    WHY := the GPU here is $(firstword $(OLD)), older than sm_80
  else ifneq ($(GPUS),)
    override GPU := 0
    WHY := nvcc is here, but what nvidia-smi says of compute capabilities is no number
  else
    override GPU := 0
    WHY := nvcc is here, but nvidia-smi finds no GPU
  endif
  WHY += (GPU=$(if $(filter 0,$(GPU)),1,0) overrides)
else ifneq ($(filter 0 1,$(GPU)),)
  WHY := asked for by GPU=$(GPU)
else
  $(error GPU is 0 or 1, not "$(GPU)")
endif

ifeq ($(GPU),1)
  ifeq ($(NVCC),)
    $(error GPU=1 needs nvcc, which is not on the PATH; GPU=0 builds for the CPU)
  endif
  PRECISION ?= BF16
  GPU_ARCH ?= $(or $(FOUND),80 90)
else
  PRECISION ?= FP32
endif
ifeq ($(filter BF16 FP32,$(PRECISION)),)
  $(error PRECISION is BF16 or FP32, not "$(PRECISION)")
endif

# ----------------------------------------------------------------------------------------------------------------------
# How to compile

DEFINES := -DPRECISION_BF16=$(if $(filter BF16,$(PRECISION)),1,0)
WARN := -Wall -Wextra
# inference and the lab include the trainer and use a part of it
PARTLY_USED := -Wno-unused-function
comma := ,
empty :=
space := $(empty) $(empty)

ifeq ($(GPU),1)
  VARIANT := gpu-$(PRECISION)-sm$(subst $(space),-,$(strip $(GPU_ARCH)))
  # Machine code for these. Several are a build to be passed on: it has PTX of the newest, too, of which a driver makes
  # code for GPUs that are newer still. PTX for one more target is another run of the compiler's front end, so a build
  # for one GPU goes without.
  NEWEST := $(if $(word 2,$(GPU_ARCH)),$(shell printf '%s\n' $(GPU_ARCH) | sort -n | tail -n 1))
  # nvcc optimizes kernels side by side: `make infer` takes 20 s in place of 35 on 16 cores, 55 in place of 82 on 2 (13.0).
  SPLIT := $(if $(filter-out 0 1,$(shell nproc)),$(if $(shell $(NVCC) --help | grep -e --split-compile),--split-compile 0))
  # -O1 is for the host's code, which a step does not wait for: 8 s less than -O3 for inference. Kernels get -O3 anyway.
  CUFLAGS := -O1 -std=c++17 -lineinfo -Xcompiler -fopenmp,-Wall,-Wextra,$(PARTLY_USED) -diag-suppress 177 $(SPLIT) \
             $(foreach a,$(GPU_ARCH),-gencode arch=compute_$(a:90=90a)$(comma)code=sm_$(a:90=90a)) \
             $(if $(NEWEST),-gencode arch=compute_$(NEWEST)$(comma)code=compute_$(NEWEST)) -DGPU_ARCH='"$(strip $(GPU_ARCH))"' $(DEFINES)
  CFLAGS := -O2 -g -std=gnu11 $(WARN) $(DEFINES)
  # The toolkit's libraries; of pip's packages, which hold libcublas.so.13 but no libcublas.so, by their files' names
  LIB = $(firstword $(wildcard $(CUDA)/lib64/lib$(1).so $(CUDA)/lib/lib$(1).so) \
        $(lastword $(sort $(wildcard $(CUDA)/lib/lib$(1).so.*))))
  LIBRARIES := $(foreach name,cublas cublasLt,-l$(if $(CUDA),:$(notdir $(or $(call LIB,$(name)),\
               $(error CUDA=$(CUDA): expected lib$(name).so in its lib/, found none))),$(name)))
  SEARCHED := $(if $(CUDA),$(foreach folder,$(wildcard $(CUDA)/lib64 $(CUDA)/lib),\
              -L$(folder) -Xlinker -rpath=$(abspath $(folder))))
  LINK = $(NVCC) -Xcompiler -fopenmp $^ -o $@ $(NCCL_LINK) $(SEARCHED) $(LIBRARIES) -lm
  SUMMARY := GPU build, $(PRECISION), sm $(GPU_ARCH)
  # NCCL joins several GPUs. NCCL=FOLDER has include/nccl.h; NCCL=0: without. It is looked for beside nvcc, in the system,
  # among pip's packages. The trainer alone needs it.
  ifneq ($(NCCL),0)
    NCCL_AT := $(firstword $(foreach f,$(NCCL) $(CUDA) $(patsubst %/bin/nvcc,%,$(realpath $(NVCC))) /usr /usr/local \
                   $(shell python3 -c 'import nvidia.nccl; print(*nvidia.nccl.__path__)' 2>/dev/null),\
                   $(if $(wildcard $(f)/include/nccl.h),$(f))))
    NCCL_LIB := $(firstword $(wildcard $(foreach l,lib lib64 lib/x86_64-linux-gnu lib/aarch64-linux-gnu,$(NCCL_AT)/$(l)/libnccl.so.2)))
  endif
  ifneq ($(NCCL_LIB),)
    NCCL_FLAGS := -DGOLDFINCH_NCCL=1 $(if $(filter /usr,$(NCCL_AT)),,-I$(NCCL_AT)/include)
    NCCL_LINK_TRAINER := -Xlinker $(NCCL_LIB),-rpath=$(dir $(NCCL_LIB))
    SUMMARY += with NCCL
  endif
else
  MARCH ?= native
  VARIANT := cpu-$(PRECISION)$(addprefix -,$(subst $(comma),-,$(SANITIZE)) $(if $(DEBUG),debug) \
             $(filter-out g++,$(notdir $(CXX))) $(or $(filter-out native,$(MARCH)),$(if $(MARCH),,any)))
  VARIANT := $(subst $(space),,$(VARIANT))
  TARGET := $(addprefix -march=,$(MARCH))
  OPTIMIZE := -O3 $(TARGET)
  SYMBOLS :=                                    # for gdb these take a quarter of the time that g++ needs
  ifneq ($(DEBUG),)
    OPTIMIZE := -Og $(TARGET)
    SYMBOLS := -g
    DEFINES += -DCUDA_ON_CPU_DEBUG
  endif
  ifneq ($(SANITIZE),)
    OPTIMIZE := -Og $(TARGET) -fno-omit-frame-pointer -fsanitize=$(SANITIZE) -fno-sanitize-recover=all
    SYMBOLS := $(if $(DEBUG),-g,-g1)            # 1: functions and lines
    DEFINES += -DCUDA_ON_CPU_SANITIZE
  endif
  # No kernel asks for errno or for traps; without them g++ works on several numbers at once in more places.
  CUFLAGS := $(OPTIMIZE) $(SYMBOLS) -std=c++17 -fno-strict-aliasing -fno-math-errno -fno-trapping-math -ffp-contract=off -fopenmp $(WARN) \
             $(PARTLY_USED) -Wno-unknown-pragmas -Wno-attributes $(if $(findstring clang,$(CXX)),-Wno-pass-failed) \
             -iquote . -iquote build/cpp -Idev/cpu \
             -DCUDA_ON_CPU -DGOLDFINCH_NCCL=1 $(DEFINES)
  CFLAGS := $(if $(DEBUG)$(SANITIZE),$(OPTIMIZE),-O2) $(SYMBOLS) -std=gnu11 $(WARN) $(DEFINES)
  LINK = $(CXX) $(OPTIMIZE) -fopenmp $^ -o $@ -lm
  LAB_FLAGS := -iquote dev $(if $(DEBUG)$(SANITIZE),,-O1)
  SUMMARY := CPU build, $(PRECISION)$(if $(SANITIZE), with -fsanitize=$(SANITIZE))
endif
DIR := build/$(VARIANT)
$(info $(SUMMARY): $(WHY))
# Whoever changes a flag (OPTIMIZE=-O2) or the compiler gets what was asked for: all objects depend on this file.
COMMANDS := $(CXX) $(NVCC) $(CUFLAGS) $(LAB_FLAGS) $(CC) $(CFLAGS)
ifneq ($(file <$(DIR)/commands),$(COMMANDS))
  $(shell mkdir -p $(DIR))
  $(file >$(DIR)/commands,$(COMMANDS))
endif

# ----------------------------------------------------------------------------------------------------------------------
# What to build

# a second name for the file, or a copy where the system does not allow one, as with another user's build
TO_THE_TOP = ln -f $< $@ 2>/dev/null || cp --remove-destination $< $@

train: train_goldfinch
infer: infer_goldfinch
train_goldfinch infer_goldfinch test_goldfinch: %: $(DIR)/%
	@$(TO_THE_TOP)

# The scripts keep one core busy, so they run beside ./test_goldfinch; what they print comes after it.
test: train_goldfinch infer_goldfinch test_goldfinch
	@(dev/test.sh && dev/test_infer.sh && dev/test_make.sh) >$(DIR)/scripts.txt 2>&1 & scripts=$$!; \
	trap 'trap - TERM; kill 0' INT TERM; \
	./test_goldfinch; code=$$?; wait $$scripts || code=1; cat $(DIR)/scripts.txt; exit $$code

cache-table: $(DIR)/infer_goldfinch
	@$< --cache-table

$(DIR)/train_goldfinch $(DIR)/infer_goldfinch: %: %.o
	$(LINK)
$(DIR)/train_goldfinch.o: CUFLAGS += $(NCCL_FLAGS)
$(DIR)/train_goldfinch: NCCL_LINK := $(NCCL_LINK_TRAINER)
.PHONY: $(DEV:%=dev/%)
$(DEV:%=dev/%): %: $(DIR)/%
	@$(TO_THE_TOP)
$(DEV:%=$(DIR)/dev/%): %: %.o
	$(LINK)
$(DEV:%=$(DIR)/dev/%.o): CUFLAGS += $(LAB_FLAGS)
$(DEV:%=$(DIR)/dev/%.o): | $(DIR)/dev
$(DIR)/test_goldfinch: $(DIR)/test_goldfinch.o $(DIR)/kernels_for_test.o
	$(LINK)
$(DIR)/test_goldfinch.o: test_goldfinch.c Makefile $(DIR)/commands | $(DIR)
	$(CC) $(CFLAGS) -MMD -c $< -o $@
$(DIR) $(DIR)/dev:
	@mkdir -p $@

ifeq ($(GPU),1)
$(DIR)/%.o: %.cu Makefile $(DIR)/commands | $(DIR)
	$(NVCC) $(CUFLAGS) -MMD -c $< -o $@
$(DIR)/kernels_for_test.o: infer_goldfinch.cu Makefile $(DIR)/commands | $(DIR)
	$(NVCC) $(CUFLAGS) -DGOLDFINCH_TEST -MMD -c $< -o $@
else
# g++ does not know `kernel<<<shape>>>(arguments);`. One sed expression makes a call of it (dev/cpu/launch.h), another
# announces shared arrays (one in a line), a third turns to the rewritten files where one includes another: by their names
# in build/cpp, so that a file has one name in all rules. Lines stay, but for a line that begins with <<<: it joins the
# one above, and an empty line takes its place.
NAME := [A-Za-z_][A-Za-z0-9_:]*
KERNEL := ($(NAME)(<([^<>]|<[^<>]*>)*>)?)
SHAPE := (([^>]|>{1,2}[^>])*)
CALL := [\&](const auto \&...arguments) { \1(arguments...); }
CU_TO_CPP = sed -Ez 's/\n *(<<<[^\n]*)/\1\n/g' $< | sed -E \
  -e 's/$(KERNEL)<<<$(SHAPE)>>>/cuda_on_cpu::launch("\1", cuda_on_cpu::Shape(\4), $(CALL))/g' \
  -e 's/__shared__[^;()]*( |__align__\([^)]*\) [^;]* )($(NAME))(\[[^;]*)?;/& CUDA_ON_CPU_SHARED(\2)/' \
  -e 's/^(\#include ")(\.\.\/)?([^"]*\.cu)"/\1\3.cpp"/'

vpath %.cu dev
.SECONDARY: $(DEV:%=build/cpp/dev/%.cu.cpp)
build/cpp/%.cu.cpp: %.cu Makefile
	@mkdir -p $(@D)
	@(echo '#line 1 "$<"'; $(CU_TO_CPP)) > $@
$(DIR)/%.o: build/cpp/%.cu.cpp $(DIR)/commands | $(DIR) $(patsubst %,build/cpp/%.cpp,$(wildcard *.cu))
	$(CXX) $(CUFLAGS) -MMD -c $< -o $@
$(DIR)/kernels_for_test.o: build/cpp/infer_goldfinch.cu.cpp build/cpp/train_goldfinch.cu.cpp $(DIR)/commands | $(DIR)
	$(CXX) $(CUFLAGS) -DGOLDFINCH_TEST -MMD -c $< -o $@
endif

-include $(wildcard $(DIR)/*.d $(DIR)/dev/*.d)
endif
