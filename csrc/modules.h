// Whether a torch module is still what it was, object by object: a step asks it of a hundred blocks, and a walk in
// Python would take longer than their kernels at small images.
#pragma once
#include <pybind11/pybind11.h>

namespace pf {

// Every object that calling the module depends on: classes and their forward, attributes, parameters, buffers, hooks,
// and those of its children; and a byte for each, which says where to look next. To be kept alive, so that no new
// object can take an old one's address; in Python's own tuple, whose cycles its garbage collector sees.
std::pair<pybind11::tuple, pybind11::bytes> objects_of(pybind11::handle module);

// Whether objects_of(module) would still be the very same objects.
bool has_objects(pybind11::handle module, const pybind11::tuple& seen, const pybind11::bytes& kinds);

// Which tensors a module's parameters are, its children's too, and how often each was changed in place: (id, version)
// after (id, version), flat.
pybind11::tuple versions_of(pybind11::handle module);

}  // namespace pf
