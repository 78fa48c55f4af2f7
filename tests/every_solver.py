"""The seven solvers as they are by default, by short names."""

import eqxproj

SOLVERS = {
    "AP": eqxproj.AlternatingProjections(),
    "AR": eqxproj.AlternatingReflections(),
    "DR": eqxproj.DouglasRachford(),
    "DM": eqxproj.DifferenceMap(),
    "RRR": eqxproj.RelaxedReflectReflect(),
    "CP": eqxproj.CyclicProjections(),
    "CDR": eqxproj.CyclicDouglasRachford(),
}
