"""Describes GPUs to XLA, to compile for them without the device.

XLA's choices depend on these properties. They are the vendor's for the named
boards, as the device reports them.
"""


def _describe(
  name: str,
  *,
  capability: str,
  cores: int,
  smem_core: int,
  smem_block: int,
  bandwidth: int,
  l2: int,
  clock_ghz: float,
  memory: int,
) -> str:
  major, minor = capability.split(".")
  # Features of Hopper and later must be enabled (sm_90a).
  features = "ACCELERATED_FEATURES" if int(major) >= 9 else "NONE"
  fpus = 64 if capability == "8.0" else 128
  return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {smem_core}
  shared_memory_per_block_optin: {smem_block}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  clock_rate_ghz: {clock_ghz}
  device_memory_size: {memory}
  cuda_compute_capability {{
    major: {major} minor: {minor} feature_extension: {features}
  }}
  device_vendor: "NVIDIA Corporation"
  name: "{name}"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


TARGETS = {
  "A100": _describe(
    "NVIDIA A100-SXM4-80GB",
    capability="8.0",
    cores=108,
    smem_core=167936,
    smem_block=166912,
    bandwidth=2_039_040_000_000,
    l2=41_943_040,
    clock_ghz=1.41,
    memory=85_100_068_864,
  ),
  "L4": _describe(
    "NVIDIA L4",
    capability="8.9",
    cores=58,
    smem_core=102400,
    smem_block=101376,
    bandwidth=300_000_000_000,
    l2=50_331_648,
    clock_ghz=2.04,
    memory=23_000_000_000,
  ),
  "H100": _describe(
    "NVIDIA H100 80GB HBM3",
    capability="9.0",
    cores=132,
    smem_core=233472,
    smem_block=232448,
    bandwidth=3_352_320_000_000,
    l2=52_428_800,
    clock_ghz=1.98,
    memory=84_942_979_072,
  ),
  "H200": _describe(
    "NVIDIA H200",
    capability="9.0",
    cores=132,
    smem_core=233472,
    smem_block=232448,
    bandwidth=4_800_000_000_000,
    l2=62_914_560,
    clock_ghz=1.98,
    memory=150_754_820_096,
  ),
  "B200": _describe(
    "NVIDIA B200",
    capability="10.0",
    cores=148,
    smem_core=233472,
    smem_block=232448,
    bandwidth=8_000_000_000_000,
    l2=132_644_864,
    clock_ghz=1.965,
    memory=191_514_804_224,
  ),
}
