"""Peak operations per second of known devices."""

import re

# Dense, without sparsity, by a part of the device's name: bf16 or fp16 with tensor cores, and fp32
# without TF32. Of several that match the first counts. From the vendor's data sheets.
PEAKS = {
    "GB200": (2500e12, 80e12),
    "B200": (2250e12, 75e12),
    "GH200": (989e12, 67e12),
    "H200 NVL": (835e12, 60e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 30.3e12),
    "A30": (165e12, 10.3e12),
    "A10": (125e12, 31.2e12),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Returns a device's best in `fp32`, `bf16` or `fp16`; None if it is not in the table."""
    for name, (halves, fp32) in PEAKS.items():
        if re.search(rf"\b{name}\b", device_name):
            return fp32 if precision == "fp32" else halves
    return None
