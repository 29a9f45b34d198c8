"""The table of nodes, in the order ComfyUI lists them."""

from __future__ import annotations

from .asking import ComputeScores, EvaluateRetention
from .learning import Consolidate, ConsolidateInClosedForm, ExamplePictures, LearnConcept
from .stacks import ForgetConcept, ImportLora, LoadConceptStack, MergeStacks
from .undoing import StackHistory, UndoConcept
from .using import (
    ApplyConcepts,
    ConceptAreas,
    ExportConcepts,
    SelectConcepts,
)

NODES = [
    LoadConceptStack,
    LearnConcept,
    Consolidate,
    ComputeScores,
    ApplyConcepts,
    ExportConcepts,
    EvaluateRetention,
    UndoConcept,
    ExamplePictures,
    SelectConcepts,
    ConsolidateInClosedForm,
    ForgetConcept,
    MergeStacks,
    ImportLora,
    StackHistory,
    ConceptAreas,
]
