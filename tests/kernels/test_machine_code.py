"""Reading machine code: what is written, and what is computed, while matrix products are in
flight.
"""

import pytest

from kernels.ahead.machine_code import InFlight, in_flight

PRODUCTS = (
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0",  # scores, from shared memory
    "HGMMA.64x64x16.F32.BF16 R88, R120, gdesc[UR8].tnspB, R88",
    "HGMMA.64x64x16.F32.BF16 R88, R124, gdesc[UR12].tnspB, R88, gsb0",
)
WAIT_FOR_SCORES, WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def listing(*instructions: str) -> str:
    """As cuobjdump prints them."""
    return "\n".join(
        f"        /*{16 * i:04x}*/   {text} ;   /* 0x0 */" for i, text in enumerate(instructions)
    )


def test_softmax_beside_a_product() -> None:
    done = in_flight(
        listing(*PRODUCTS, WAIT_FOR_SCORES, "MUFU.EX2 R2, R24", "@!P0 MUFU.EX2 R3, R25", WAIT)
    )
    assert done == InFlight(overwritten_operands=0, overlapped_exponentials=2)
    done = in_flight(listing(*PRODUCTS, WAIT_FOR_SCORES, WAIT, "MUFU.EX2 R2, R24"))
    assert done == InFlight(overwritten_operands=0, overlapped_exponentials=0)


WRITES = (
    "F2FP.BF16.F32.PACK_AB R121, R4, R5",
    "IMAD.WIDE R126, R2, 0x4, R6",
    "@P1 MOV R127, R2",
    "LDS.128 R117, [R2]",
)
SPARES = ("LDS.128 R116, [R2]", "STS [R120], R2", "MUFU.EX2 R128, R121")


@pytest.mark.parametrize("instruction", WRITES + SPARES)
def test_an_operand_overwritten_before_its_product_has_read_it(instruction: str) -> None:
    """Products in flight read R120 to R127."""
    during = in_flight(listing(*PRODUCTS, WAIT_FOR_SCORES, instruction, WAIT))
    assert during.overwritten_operands == (instruction in WRITES)
    after = in_flight(listing(*PRODUCTS, WAIT_FOR_SCORES, WAIT, instruction))
    assert after.overwritten_operands == 0


def test_between_the_products_of_a_group_too() -> None:
    text = listing(*PRODUCTS[:2], "MOV R120, R2", PRODUCTS[2], WAIT)
    assert in_flight(text).overwritten_operands == 1


def test_nothing_is_known_behind_a_jump() -> None:
    assert in_flight(listing(*PRODUCTS, "BRA 0x10", "MOV R120, R2")).overwritten_operands == 0
    assert in_flight(listing(*PRODUCTS, "@P0 BRA 0x10", "MOV R120, R2")).overwritten_operands == 1
