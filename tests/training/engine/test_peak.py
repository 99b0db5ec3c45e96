from pipeline.training.engine.peak import peak_flops


def test_peaks_are_found_by_the_devices_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA H100 NVL", "fp16") == 835e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops("NVIDIA L4", "bf16") == 121e12


def test_a_device_that_is_only_named_alike_has_none() -> None:
    assert peak_flops("NVIDIA A10G", "bf16") is None
    assert peak_flops("some GPU", "bf16") is None
