"""Every operation in plain XLA: the reference, on every backend and for every case."""

from fqt_jax.kernels.dispatch import Implementation, Kernel
from fqt_jax.kernels.xla import adam, attention, draws, float_conv, normed, products, transforms

IMPLEMENTATION = Implementation(
    "xla",
    {
        "forward": Kernel(products.forward),
        "input_grad": Kernel(products.input_grad, products.declines_input_grad),
        "weight_grad": Kernel(products.weight_grad, products.declines_weight_grad),
        "moments": Kernel(transforms.moments),
        "encode": Kernel(transforms.encode),
        "activate": Kernel(transforms.activate),
        "gradient_sums": Kernel(transforms.gradient_sums),
        "gradient": Kernel(transforms.gradient),
        "encode_normed": Kernel(normed.encode_normed),
        "gradient_normed": Kernel(normed.gradient_normed),
        "encode_weights": Kernel(transforms.encode_weights),
        "finish_weight_grad": Kernel(transforms.finish_weight_grad),
        "float_conv": Kernel(float_conv.conv),
        "float_conv_input_grad": Kernel(float_conv.conv_input_grad),
        "float_conv_weight_grad": Kernel(float_conv.conv_weight_grad),
        "water_filling": Kernel(draws.water_filling),
        "systematic": Kernel(draws.systematic),
        "adam": Kernel(adam.adam),
        "attention": Kernel(attention.attention),
        "attention_grad": Kernel(attention.attention_grad),
    },
)
