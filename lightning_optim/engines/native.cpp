// Looks at many tensors in one call. `native.py` says what for, and compiles it with the header files of torch.
//
// Each function can only confirm that something is as it was: where it cannot tell, Python looks again.

#include <torch/csrc/autograd/python_variable.h>

#include <cstdint>

namespace {

enum Answer : int64_t { SAME = 0, MOVED = 1, UNKNOWN = 2 };

// The facts of a tensor, one after another: calls `take` with each until that returns false.
template <typename Take>
bool each_fact(const at::Tensor& tensor, Take take) {
    auto device = tensor.device();
    auto sizes = tensor.sizes(), strides = tensor.strides();
    if (!take(static_cast<int64_t>(tensor.key_set().raw_repr()))) return false;  // classes that handle calls, lazy signs
    if (!take(static_cast<int64_t>(tensor.scalar_type()))) return false;
    if (!take(static_cast<int64_t>(device.type()) * 256 + device.index())) return false;
    if (!take(static_cast<int64_t>(sizes.size()))) return false;
    for (int64_t size : sizes) if (!take(size)) return false;
    for (int64_t stride : strides) if (!take(stride)) return false;
    return true;
}

int64_t look_at(PyObject* tensors, bool of_gradients, const int64_t* facts, const int64_t* before, int64_t* now) {
    int64_t moved = 0;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors); i++) {
        const at::Tensor& given = THPVariable_Unpack(PyList_GET_ITEM(tensors, i));
        const at::Tensor& tensor = of_gradients ? given.unsafeGetTensorImpl()->grad() : given;
        if (!tensor.defined()) return UNKNOWN;
        if (!each_fact(tensor, [&](int64_t fact) { return fact == *facts++; })) return UNKNOWN;
        now[i] = reinterpret_cast<int64_t>(tensor.mutable_data_ptr());
        moved |= now[i] ^ before[i];
    }
    return moved ? MOVED : SAME;
}

}  // namespace

// Writes the facts of a list of tensors; with null it writes nothing. Returns their number, or -1.
extern "C" int64_t describe(PyObject* tensors, int64_t* facts) {
    int64_t count = 0;
    try {
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors); i++) {
            const at::Tensor& tensor = THPVariable_Unpack(PyList_GET_ITEM(tensors, i));
            each_fact(tensor, [&](int64_t fact) {
                if (facts) facts[count] = fact;
                count++;
                return true;
            });
        }
    } catch (...) {
        PyErr_Clear();
        return -1;  // a tensor without strides, for example
    }
    return count;
}

// Whether tensors, or their gradients, have the facts of as many others, and lie where those did. Writes where they lie.
extern "C" int64_t look(PyObject* tensors, int of_gradients, const int64_t* facts, const int64_t* before, int64_t* now) {
    try {
        return look_at(tensors, of_gradients, facts, before, now);
    } catch (...) {
        PyErr_Clear();
        return UNKNOWN;  // a tensor without memory, for example
    }
}

// Whether a dict of dicts holds the same objects in the same order.
extern "C" int64_t holds(PyObject* state, PyObject* keys, PyObject* states, PyObject* values) {
    PyObject *key, *inner, *name, *value;
    Py_ssize_t place = 0, i = 0, count = 0, total = PyList_GET_SIZE(values);
    if (!PyDict_Check(state) || PyDict_GET_SIZE(state) != PyList_GET_SIZE(keys)) return UNKNOWN;
    for (; PyDict_Next(state, &place, &key, &inner); i++) {
        if (key != PyList_GET_ITEM(keys, i) || inner != PyList_GET_ITEM(states, i)) return UNKNOWN;
        if (!PyDict_Check(inner) || PyDict_GET_SIZE(inner) > total - count) return UNKNOWN;
        for (Py_ssize_t at = 0; PyDict_Next(inner, &at, &name, &value); count++) {
            if (value != PyList_GET_ITEM(values, count)) return UNKNOWN;
        }
    }
    return count == total ? SAME : UNKNOWN;
}
