#include "modules.h"

namespace pf {
namespace {

namespace py = pybind11;

py::object state_of(py::handle module) {
  auto state = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
  if (!state) throw py::error_already_set();
  return state;
}

// Calls see(object) for each object that calling the module depends on, children's too, until one call returns false.
// Whether that happened. What is seen is borrowed, of the module or its class.
template <class See>
bool walk(py::handle module, const See& see) {
  static const auto* const forward = new py::str("forward");
  static const auto* const children = new py::str("_modules");
  static const auto* const snapshot = new py::str("_snapshot");
  const auto kind = py::type::handle_of(module);
  if (!see(kind) || !see(py::getattr(kind, *forward))) return false;
  const auto state = state_of(module);
  PyObject *key = nullptr, *value = nullptr, *name = nullptr, *item = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &value);) {
    if (PyUnicode_Compare(key, snapshot->ptr()) == 0) continue;  // what this walk is for
    if (!see(py::handle(value))) return false;
    if (!PyDict_Check(value)) continue;
    // Parameters, buffers, children and hooks: a dict stays the same object when its content changes.
    const bool down = PyUnicode_Compare(key, children->ptr()) == 0;
    for (Py_ssize_t in = 0; PyDict_Next(value, &in, &name, &item);) {
      if (!see(py::handle(name)) || !see(py::handle(item))) return false;
      if (down && item != Py_None && !walk(item, see)) return false;
    }
  }
  return true;
}

void append_versions(py::handle module, py::list& found) {
  static const auto* const parameters = new py::str("_parameters");
  static const auto* const children = new py::str("_modules");
  static const auto* const version = new py::str("_version");
  const auto state = state_of(module);
  PyObject *name = nullptr, *item = nullptr;
  const auto each = [&](const py::str& key, const auto& visit) {
    PyObject* items = PyDict_GetItem(state.ptr(), key.ptr());
    if (items == nullptr || !PyDict_Check(items)) return;
    for (Py_ssize_t at = 0; PyDict_Next(items, &at, &name, &item);)
      if (item != Py_None) visit(py::handle(item));
  };
  each(*parameters, [&](py::handle p) {
    found.append(py::reinterpret_steal<py::object>(PyLong_FromVoidPtr(p.ptr())));
    found.append(py::getattr(p, *version));
  });
  each(*children, [&](py::handle child) { append_versions(child, found); });
}

}  // namespace

pybind11::tuple versions_of(pybind11::handle module) {
  py::list found;
  append_versions(module, found);
  return py::tuple(found);
}

pybind11::tuple objects_of(pybind11::handle module) {
  py::list seen;
  walk(module, [&](py::handle object) {
    seen.append(object);
    return true;
  });
  return py::tuple(seen);
}

bool has_objects(pybind11::handle module, const pybind11::tuple& seen) {
  const Py_ssize_t n = PyTuple_GET_SIZE(seen.ptr());
  Py_ssize_t i = 0;
  return walk(module, [&](py::handle object) { return i < n && PyTuple_GET_ITEM(seen.ptr(), i++) == object.ptr(); }) &&
         i == n;
}

}  // namespace pf
