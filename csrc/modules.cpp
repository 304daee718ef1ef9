#include "modules.h"

#include <array>
#include <string>

namespace pf {
namespace {

namespace py = pybind11;

// What an object is to the walk. Memory is what it takes time to read: of a value that is plain nothing is read but its
// address, and whether it is plain was found when it was first seen.
enum Kind : char { plain = 'p', items = 'i', children = 'c', module = 'm' };

py::object state_of(py::handle module) {
  auto state = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
  if (!state) throw py::error_already_set();
  return state;
}

bool is_snapshot(PyObject* key) {  // what this walk is for
  static PyObject* const name = PyUnicode_InternFromString("_snapshot");
  return key == name || PyUnicode_Compare(key, name) == 0;
}

PyObject* forward_of(py::handle kind) {
  static PyObject* const name = PyUnicode_InternFromString("forward");
  PyObject* found = PyObject_GetAttr(kind.ptr(), name);
  if (found == nullptr) throw py::error_already_set();
  return found;
}

Kind kind_of(PyObject* key, PyObject* value) {
  static constexpr std::array<const char*, 6> held = {"_parameters",        "_buffers",        "_forward_hooks",
                                                      "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"};
  if (!PyDict_Check(value)) return plain;
  if (PyUnicode_CompareWithASCIIString(key, "_modules") == 0) return children;
  for (const char* name : held)
    if (PyUnicode_CompareWithASCIIString(key, name) == 0) return items;
  return plain;
}

struct Collected {
  py::list seen;
  std::string kinds;

  void add(PyObject* object, Kind kind) {
    seen.append(py::handle(object));
    kinds.push_back(kind);
  }

  void walk(py::handle of) {
    add(py::type::handle_of(of).ptr(), plain);
    add(py::reinterpret_steal<py::object>(forward_of(py::type::handle_of(of))).ptr(), plain);
    const auto state = state_of(of);
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &value);) {
      if (is_snapshot(key)) continue;
      const Kind kind = kind_of(key, value);
      add(value, kind);
      if (kind != plain) walk_items(value, kind == children);
    }
  }

  // A dict stays the same object when its content changes.
  void walk_items(PyObject* dict, bool down) {
    PyObject *name = nullptr, *item = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &name, &item);) {
      const bool enter = down && item != Py_None;
      add(name, plain);
      add(item, enter ? module : plain);
      if (enter) walk(item);
    }
  }
};

// The same walk beside what was collected; false at the first difference.
struct Compared {
  PyObject* seen;
  const char* kinds;
  Py_ssize_t n, i = 0;

  bool next(PyObject* object, char& kind) {
    if (i == n || PyTuple_GET_ITEM(seen, i) != object) return false;
    kind = kinds[i++];
    return true;
  }

  bool walk(py::handle of) {
    char kind = plain;
    if (!next(py::type::handle_of(of).ptr(), kind)) return false;
    const auto forward = py::reinterpret_steal<py::object>(forward_of(py::type::handle_of(of)));
    if (!next(forward.ptr(), kind)) return false;
    const auto state = state_of(of);
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &value);) {
      if (!next(value, kind)) {
        if (is_snapshot(key)) continue;
        return false;
      }
      if (kind != plain && !walk_items(value)) return false;
    }
    return true;
  }

  bool walk_items(PyObject* dict) {
    PyObject *name = nullptr, *item = nullptr;
    char kind = plain;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &name, &item);) {
      if (!next(name, kind) || !next(item, kind)) return false;
      if (kind == module && !walk(item)) return false;
    }
    return true;
  }
};

void append_versions(py::handle of, py::list& found) {
  static const auto* const parameters = new py::str("_parameters");
  static const auto* const below = new py::str("_modules");
  static const auto* const version = new py::str("_version");
  const auto state = state_of(of);
  const auto each = [&](const py::str& key, const auto& visit) {
    PyObject *found_items = PyDict_GetItem(state.ptr(), key.ptr()), *name = nullptr, *item = nullptr;
    if (found_items == nullptr || !PyDict_Check(found_items)) return;
    for (Py_ssize_t at = 0; PyDict_Next(found_items, &at, &name, &item);)
      if (item != Py_None) visit(py::handle(item));
  };
  each(*parameters, [&](py::handle p) {
    found.append(py::reinterpret_steal<py::object>(PyLong_FromVoidPtr(p.ptr())));
    found.append(py::getattr(p, *version));
  });
  each(*below, [&](py::handle child) { append_versions(child, found); });
}

}  // namespace

std::pair<pybind11::tuple, pybind11::bytes> objects_of(pybind11::handle module) {
  Collected collected;
  collected.walk(module);
  return {py::tuple(collected.seen), py::bytes(collected.kinds)};
}

bool has_objects(pybind11::handle module, const pybind11::tuple& seen, const pybind11::bytes& kinds) {
  Compared compared{seen.ptr(), PyBytes_AS_STRING(kinds.ptr()), PyTuple_GET_SIZE(seen.ptr())};
  if (PyBytes_GET_SIZE(kinds.ptr()) != compared.n) throw py::value_error("kinds must have a byte for each object seen");
  return compared.walk(module) && compared.i == compared.n;
}

pybind11::tuple versions_of(pybind11::handle module) {
  py::list found;
  append_versions(module, found);
  return py::tuple(found);
}

}  // namespace pf
