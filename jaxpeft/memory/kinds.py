"""The kinds of devices that can be described: their figures, and what their compilers are told of them.

TPU: rates and bandwidths of a chip from Google's Cloud TPU documentation; memory as libtpu 0.0.42 counts it, which is
the largest program that it accepts, to the MiB (the rest of the chip's memory is the system's). The link to the host,
each way: "How to Scale Your Model" (jax-ml.github.io/scaling-book, Austin et al. 2025), "TPU networking". A link
between chips: the documentation's bidirectional bandwidth of a chip, by two directions of six links (2D torus: four).

GPU: dense bf16 rates, the generation of PCIe (16 lanes, each way) and of NVLink from NVIDIA's data sheets; the network
between hosts as in NVIDIA's DGX of that GPU (DGX H100 and H200: a ConnectX-7 of 400 Gb/s for each GPU; DGX A100: one of
200 Gb/s); everything else as the CUDA driver reports it on such a device (OpenXLA's
xla/backends/gpu/target_config/specs; deviceQuery for the RTX 4090). A run can use less of the memory than the device
has: CUDA's context, its libraries and graphs live outside the allocator. So JAX is given GPU_FRACTION of it (0.75
unless `XLA_CLIENT_MEM_FRACTION` is set, which the `jaxpeft` command sets to this): what a plan may fill.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

GPU_FRACTION = 0.95  # of a GPU's memory, for JAX's allocator


class Kind(NamedTuple):
    """A kind of device.

    Attributes:
      platform: "tpu", "cuda" or "cpu".
      memory_bytes: of one device, as its compiler counts it.
      bandwidth: of one device's memory, bytes per second; None if not known.
      flops: dense bf16 multiply-adds of one device, counted as two, per second; None if not known.
      source: where the figures come from.
      names: `device_kind` of such devices in JAX.
      config: cuda: GpuTargetConfigProto in text form.
      host: tpu: chips of one host, the smallest slice, in every dimension of a slice.
      devices_per_chip: tpu: how many JAX shows.
      options: tpu: further arguments of the topology.
      host_bandwidth: between one device's memory and the host's, each way, bytes per second; None if not known.
      link: between devices, each way, bytes per second: one link of a TPU's chip, all of a GPU's NVLinks; None where
        such devices come alone.
      network: cuda: between hosts, each way, bytes per second of one GPU; None likewise.
      largest: tpu: chips of the largest slice, in every dimension.
    """

    platform: str
    memory_bytes: int
    bandwidth: float | None
    flops: float | None
    source: str
    names: tuple[str, ...]
    config: str = ""
    host: tuple[int, ...] = ()
    devices_per_chip: int = 1
    options: tuple[tuple[str, Any], ...] = ()
    host_bandwidth: float | None = None
    link: float | None = None
    network: float | None = None
    largest: tuple[int, ...] = ()


def _gpu(
    description: str,
    *,
    capability: tuple[int, int],
    cores: int,
    fpus: int,
    threads: int,
    shared: int,
    l2: int,
    clock_ghz: float,
    bandwidth: float,
    host_bandwidth: float,
    memory_bytes: int,
    flops: float,
    names: Sequence[str],
    link: float | None = None,
    network: float | None = None,
) -> Kind:
    """A GPU; `cores` are multiprocessors, `fpus`, `threads` and `shared` (bytes of shared memory) those of one."""
    config = f"""
      gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
        shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared - 1024}
        core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock_ghz}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        memory_bandwidth: {bandwidth:.0f} l2_cache_size: {l2} device_memory_size: {memory_bytes}
        cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
      }}
      platform_name: "CUDA"
      dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
      runtime_version {{ major: 13 minor: 0 patch: 0 }}
      device_description_str: "{description}"
    """
    source = f"{description}: NVIDIA's data sheet, CUDA device properties"
    return Kind(
        "cuda", memory_bytes, bandwidth, flops, source, tuple(names), config, (), 1, (), host_bandwidth, link, network
    )


def _tpu(memory_mib: int, gb_per_s: float, tflops: float, host: tuple[int, ...], names: Sequence[str], **more) -> Kind:
    source = "Cloud TPU documentation; memory as libtpu 0.0.42 counts it"
    return Kind("tpu", memory_mib << 20, gb_per_s * 1e9, tflops * 1e12, source, tuple(names), host=host, **more)


_PCIE4, _PCIE5 = 32e9, 64e9

_HOPPER: dict[str, Any] = {
    "capability": (9, 0),
    "cores": 132,
    "fpus": 128,
    "threads": 2048,
    "shared": 233472,
    "l2": 50 << 20,
    "clock_ghz": 1.98,
    "host_bandwidth": _PCIE5,
    "flops": 989.4e12,
    "link": 450e9,
    "network": 50e9,
}

TARGETS: dict[str, Kind] = {
    "h200": _gpu(
        "NVIDIA H200 SXM 141GB", bandwidth=4.8e12, memory_bytes=151397597184, names=["NVIDIA H200"], **_HOPPER
    ),
    "h100": _gpu(
        "NVIDIA H100 SXM 80GB",
        bandwidth=3.35232e12,
        memory_bytes=84942979072,
        names=["NVIDIA H100 80GB HBM3"],
        **_HOPPER,
    ),
    "a100": _gpu(
        "NVIDIA A100 SXM 80GB",
        capability=(8, 0),
        cores=108,
        fpus=64,
        threads=2048,
        shared=167936,
        l2=40 << 20,
        clock_ghz=1.41,
        bandwidth=2.03904e12,
        host_bandwidth=_PCIE4,
        memory_bytes=85100068864,
        flops=312e12,
        link=300e9,
        network=25e9,
        names=["NVIDIA A100-SXM4-80GB"],
    ),
    "rtx4090": _gpu(
        "NVIDIA GeForce RTX 4090 24GB",
        capability=(8, 9),
        cores=128,
        fpus=128,
        threads=1536,
        shared=102400,
        l2=72 << 20,
        clock_ghz=2.52,
        bandwidth=1.008e12,
        host_bandwidth=_PCIE4,
        memory_bytes=25386352640,
        flops=165.2e12,
        names=["NVIDIA GeForce RTX 4090"],
    ),
    # Without the option a v4 chip is described as two devices of half its memory; a v4 in use is one.
    "v4": _tpu(
        31485,
        1228,
        275,
        (2, 2, 1),
        ["TPU v4"],
        options=(("chip_config_name", "megacore"),),
        host_bandwidth=16e9,
        link=50e9,
        largest=(16, 16, 16),
    ),
    "v5e": _tpu(16126, 819, 197, (2, 2), ["TPU v5 lite", "TPU v5e"], host_bandwidth=16e9, link=50e9, largest=(16, 16)),
    "v5p": _tpu(
        98041, 2765, 459, (2, 2, 1), ["TPU v5", "TPU v5p"], host_bandwidth=16e9, link=100e9, largest=(16, 16, 24)
    ),
    "v6e": _tpu(
        31996, 1638, 918, (2, 2), ["TPU v6 lite", "TPU v6e"], host_bandwidth=32e9, link=100e9, largest=(16, 16)
    ),
    # Half a chip: 192 GiB, 7380 GB/s and 2307 TFLOP/s are the chip's.
    "tpu7x": _tpu(
        97020, 7380 / 2, 2307 / 2, (2, 2, 1), ["TPU7x"], devices_per_chip=2, link=100e9, largest=(16, 24, 24)
    ),
    "cpu": Kind(
        "cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None, None, "this machine", names=("cpu",)
    ),
}
