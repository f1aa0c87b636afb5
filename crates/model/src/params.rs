//! Named f32 parameters with Hugging Face names, shared between models until one writes, and their gradients.

use kernels::Store;
use std::collections::HashMap;
use std::sync::Arc;

/// Index of a parameter in its [`ParamStore`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParamId(pub(crate) usize);

/// One named tensor.
#[derive(Clone, Debug)]
pub struct Param {
    /// Hugging Face name.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    data: Arc<Vec<f32>>,
}

impl Param {
    /// The values.
    pub fn data(&self) -> &[f32] {
        &self.data
    }
    /// Whether both parameters are backed by the same memory.
    pub fn shares_with(&self, other: &Param) -> bool {
        Arc::ptr_eq(&self.data, &other.data)
    }
}

/// All parameters of a model. Cloning shares the values; [`data_mut`](Self::data_mut) copies on first write.
#[derive(Clone, Debug, Default)]
pub struct ParamStore {
    params: Vec<Param>,
    index: HashMap<String, ParamId>,
}

impl ParamStore {
    /// Adds or replaces a parameter.
    pub fn insert(&mut self, name: impl Into<String>, shape: Vec<usize>, data: Vec<f32>) -> ParamId {
        let name = name.into();
        assert_eq!(shape.iter().product::<usize>(), data.len(), "parameter `{name}` of shape {shape:?}");
        let param = Param { name: name.clone(), shape, data: Arc::new(data) };
        if let Some(&id) = self.index.get(&name) {
            self.params[id.0] = param;
            return id;
        }
        let id = ParamId(self.params.len());
        self.params.push(param);
        self.index.insert(name, id);
        id
    }
    /// Adds `param` without copying its values.
    pub(crate) fn share(&mut self, param: &Param) {
        assert!(self.id(&param.name).is_none(), "parameter `{}` is already there", param.name);
        self.index.insert(param.name.clone(), ParamId(self.params.len()));
        self.params.push(param.clone());
    }
    /// Finds a parameter by name.
    pub fn id(&self, name: &str) -> Option<ParamId> {
        self.index.get(name).copied()
    }
    /// The parameter.
    pub fn get(&self, id: ParamId) -> &Param {
        &self.params[id.0]
    }
    /// Its values.
    pub fn data(&self, id: ParamId) -> &[f32] {
        &self.params[id.0].data
    }
    /// Its values for writing; copies them first when another model shares them.
    pub fn data_mut(&mut self, id: ParamId) -> &mut [f32] {
        let data: &mut Vec<f32> = Arc::make_mut(&mut self.params[id.0].data);
        data
    }
    /// All parameters with their ids, in insertion order.
    pub fn iter(&self) -> impl Iterator<Item = (ParamId, &Param)> {
        self.params.iter().enumerate().map(|(i, p)| (ParamId(i), p))
    }
    /// Gives parameters whose name, shape and bits are those of one in `other` its memory instead of their own.
    pub fn share_equal(&mut self, other: &Self) {
        let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
        for param in &mut self.params {
            if let Some(theirs) = other.id(&param.name).map(|id| other.get(id))
                && param.shape == theirs.shape
                && same(&param.data, &theirs.data)
            {
                param.data = Arc::clone(&theirs.data);
            }
        }
    }
    /// Number of parameters (tensors).
    pub fn len(&self) -> usize {
        self.params.len()
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.params.is_empty()
    }
}

/// Gradient buffers for the trainable subset of a [`ParamStore`]; the backward pass skips parameters without one.
#[derive(Clone, Debug, Default)]
pub struct Grads {
    slots: Vec<Option<Slot>>,
    /// Memory of [released](Self::release) gradients, for those of the same size that are written next.
    free: Vec<Vec<f32>>,
}

/// One parameter's gradient.
#[derive(Clone, Debug)]
struct Slot {
    /// Empty while it has no memory.
    values: Vec<f32>,
    len: usize,
    /// Counts as zeros, whatever the values are: whoever writes first may overwrite them.
    stale: bool,
}

impl Slot {
    /// Makes sure that a gradient to be written has memory.
    fn occupied(&mut self, free: &mut Vec<Vec<f32>>) -> &mut Self {
        if self.values.len() != self.len {
            let fitting = free.iter().position(|values| values.len() == self.len);
            self.values = fitting.map_or_else(|| vec![0.0; self.len], |i| free.swap_remove(i));
        }
        self
    }

    fn zeroed(&mut self) -> &mut [f32] {
        if std::mem::take(&mut self.stale) {
            self.values.fill(0.0);
        }
        &mut self.values
    }

    fn target(&mut self) -> (&mut [f32], Store) {
        let store = if std::mem::take(&mut self.stale) { Store::Overwrite } else { Store::Accumulate };
        (&mut self.values, store)
    }
}

impl Grads {
    /// Zeroed buffers for `trainable`.
    pub fn zeros(store: &ParamStore, trainable: &[ParamId]) -> Self {
        let mut slots = vec![None; store.len()];
        for &id in trainable {
            let len = store.data(id).len();
            slots[id.0] = Some(Slot { values: vec![0.0; len], len, stale: false });
        }
        Self { slots, free: Vec::new() }
    }
    /// Gradients of `trainable` that get memory when they are written and give it back at [`release`](Self::release); zero until then.
    pub fn on_demand(store: &ParamStore, trainable: &[ParamId]) -> Self {
        let mut slots = vec![None; store.len()];
        for &id in trainable {
            slots[id.0] = Some(Slot { values: Vec::new(), len: store.data(id).len(), stale: true });
        }
        Self { slots, free: Vec::new() }
    }
    /// The gradient of `id` becomes zero, and its memory the next one's that is written and as large.
    pub fn release(&mut self, id: ParamId) {
        if let Some(slot) = self.slots.get_mut(id.0).and_then(Option::as_mut)
            && !slot.values.is_empty()
        {
            self.free.push(std::mem::take(&mut slot.values));
            slot.stale = true;
        }
    }
    /// The slot of `id` with memory, if it is trainable.
    fn slot(&mut self, id: ParamId) -> Option<&mut Slot> {
        Some(self.slots.get_mut(id.0)?.as_mut()?.occupied(&mut self.free))
    }
    /// Whether `id` is trainable.
    pub fn wants(&self, id: ParamId) -> bool {
        self.slots.get(id.0).is_some_and(Option::is_some)
    }
    /// The gradient of `id`, if it is trainable.
    ///
    /// # Panics
    /// Between [`clear`](Self::clear) and [`settle`](Self::settle).
    pub fn get(&self, id: ParamId) -> Option<&[f32]> {
        let slot = self.slots.get(id.0)?.as_ref()?;
        assert!(!slot.stale, "gradients are read before they are settled");
        Some(&slot.values)
    }
    /// The gradient of `id` for adding to, if it is trainable.
    pub fn get_mut(&mut self, id: ParamId) -> Option<&mut [f32]> {
        Some(self.slot(id)?.zeroed())
    }
    /// The gradient of `id` for one product that covers it, if it is trainable, and whether to add to it: the first one after
    /// [`clear`](Self::clear) overwrites.
    pub fn target(&mut self, id: ParamId) -> Option<(&mut [f32], Store)> {
        Some(self.slot(id)?.target())
    }
    /// [`target`](Self::target) of several different ids at once.
    ///
    /// # Panics
    /// When two ids are the same, or one is of another model.
    pub fn targets<const N: usize>(&mut self, ids: [ParamId; N]) -> [Option<(&mut [f32], Store)>; N] {
        let Self { slots, free } = self;
        let slots = slots.get_disjoint_mut(ids.map(|id| id.0)).expect("gradients of different parameters");
        slots.map(|slot| Some(slot.as_mut()?.occupied(free).target()))
    }
    /// All gradients become zero; their memory is written when somebody adds to them, or at [`settle`](Self::settle).
    pub fn clear(&mut self) {
        self.slots.iter_mut().flatten().for_each(|slot| slot.stale = true);
    }
    /// Writes the zeros of gradients that nobody added to.
    pub fn settle(&mut self) {
        let Self { slots, free } = self;
        slots.iter_mut().flatten().for_each(|slot| _ = slot.occupied(free).zeroed());
    }
    /// Trainable ids in order.
    pub fn ids(&self) -> impl Iterator<Item = ParamId> + '_ {
        self.slots.iter().enumerate().filter(|(_, s)| s.is_some()).map(|(i, _)| ParamId(i))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grads() -> (Grads, ParamId, ParamId) {
        let mut store = ParamStore::default();
        let ids = ["a", "b", "frozen"].map(|name| store.insert(name, vec![2], vec![1.0, 2.0]));
        (Grads::zeros(&store, &ids[..2]), ids[0], ids[1])
    }

    #[test]
    fn after_clear_the_first_writer_overwrites_and_others_add() {
        let (mut grads, a, b) = grads();
        grads.get_mut(a).unwrap().fill(5.0);
        grads.get_mut(b).unwrap().fill(7.0);
        assert_eq!(grads.target(a).unwrap().1, Store::Accumulate);
        grads.clear();
        let (values, store) = grads.target(a).unwrap();
        assert_eq!(store, Store::Overwrite);
        values.fill(1.0);
        assert_eq!(grads.target(a).unwrap().1, Store::Accumulate);
        grads.settle();
        assert_eq!((grads.get(a).unwrap(), grads.get(b).unwrap()), (&[1.0; 2][..], &[0.0; 2][..]));
        grads.clear();
        assert_eq!(grads.get_mut(a).unwrap(), [0.0; 2]);
    }

    #[test]
    fn equal_values_are_shared_until_one_is_written() {
        let store = |zero: f32, shape: Vec<usize>| {
            let mut store = ParamStore::default();
            store.insert("equal", vec![2], vec![1.0, 0.0]);
            store.insert("zero", vec![1], vec![zero]);
            store.insert("shaped", shape, vec![3.0, 4.0]);
            store
        };
        let (mut ours, theirs) = (store(0.0, vec![2]), store(-0.0, vec![1, 2]));
        ours.share_equal(&theirs);
        let shared: Vec<bool> = ours.iter().map(|(id, param)| param.shares_with(theirs.get(id))).collect();
        assert_eq!(shared, [true, false, false]);
        ours.data_mut(ParamId(0))[0] = 7.0;
        assert_eq!((ours.data(ParamId(0))[0], theirs.data(ParamId(0))[0]), (7.0, 1.0));
    }

    #[test]
    fn memory_goes_from_gradient_to_gradient() {
        let mut store = ParamStore::default();
        let [a, b] = ["a", "b"].map(|name| store.insert(name, vec![2], vec![1.0, 2.0]));
        let mut on_demand = Grads::on_demand(&store, &[a, b]);
        assert!(on_demand.wants(a) && on_demand.wants(b));
        let (values, how) = on_demand.target(a).unwrap();
        assert_eq!(how, Store::Overwrite);
        values.fill(3.0);
        let memory = values.as_ptr();
        assert_eq!(on_demand.get(a).unwrap(), [3.0; 2]);
        on_demand.release(a);
        let zeros = on_demand.get_mut(b).unwrap();
        assert_eq!((zeros.as_ptr(), &*zeros), (memory, &[0.0; 2][..]));
        on_demand.release(b);
        // Nothing to give back.
        on_demand.release(b);
        let [first, second] = on_demand.targets([b, a]).map(|target| target.unwrap());
        assert!(first.1 == Store::Overwrite && second.1 == Store::Overwrite);
        assert_eq!(first.0.as_ptr(), memory);
        on_demand.settle();
        assert!(on_demand.get(a).is_some() && on_demand.get(b).is_some());
    }

    #[test]
    #[should_panic(expected = "before they are settled")]
    fn stale_gradients_are_not_read() {
        let (mut grads, a, _) = grads();
        grads.clear();
        grads.get(a);
    }
}
