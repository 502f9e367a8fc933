"""Strategies that split a parameter over the devices of a batch, and arrays placed by them."""

import jax

STRATEGIES = [
    ("data=8", "data"),
    ("fsdp=8", "fsdp"),
    ("model=8", "tensor"),
    ("fsdp=4,model=2", "fsdp+tensor"),
    ("data=2,fsdp=2,model=2", "fsdp+tensor"),
    ("fsdp=4,model=2", "embed:fsdp+model,batch:fsdp"),  # one axis by both
    ("fsdp=4,model=2", "embed:model+fsdp,batch:fsdp"),
    ("fsdp=8", "vocab:fsdp,heads:fsdp"),
    ("fsdp=4,context=2", "embed:fsdp,length:context"),
    ("fsdp=2,model=4", "embed:fsdp,length:model,heads:model,vocab:model"),
    ("data=2,context=4", "embed:context,length:context"),
    ("fsdp=2,context=4", "embed:fsdp+context,length:context"),
    ("context=4,model=2", "embed:context,length:context+model,heads:model,vocab:model"),
]


def placed(sharding, axes, array):
    """An array, sharded by its logical axes."""
    return jax.device_put(array, sharding.named(axes, array.shape))
