"""The families that LOP takes, by the `model_type` of their configs."""

from lop.model.families import qwen2_5_vl, qwen2_vl
from lop.model.families.family import Family

_ALL: tuple[Family, ...] = (qwen2_5_vl.FAMILY, qwen2_vl.FAMILY)
FAMILIES = {family.model_type: family for family in _ALL}
