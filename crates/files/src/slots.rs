//! A table whose numbers are never given out twice: an old number finds nothing.

/// Entries by number. A number is never 0.
#[derive(Debug)]
pub(crate) struct Slots<T> {
    slots: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
    count: usize,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new(), count: 0 }
    }
}

/// The lower half is the place, counted from 1, the upper half how often it was used before.
fn place(number: u64) -> Option<(usize, u32)> {
    let index = (number as u32).checked_sub(1)?;
    Some((index as usize, (number >> 32) as u32))
}

impl<T> Slots<T> {
    /// Stores what `make` makes of its number. `None`: all numbers are taken.
    pub fn insert(&mut self, make: impl FnOnce(u64) -> T) -> Option<u64> {
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                let index = u32::try_from(self.slots.len()).ok().filter(|index| *index < u32::MAX)?;
                self.slots.push((0, None));
                index
            }
        };
        let (used, slot) = self.slots.get_mut(index as usize)?;
        let number = (u64::from(*used) << 32) | (u64::from(index) + 1);
        *slot = Some(make(number));
        self.count += 1;
        Some(number)
    }

    pub fn get(&self, number: u64) -> Option<&T> {
        let (index, used) = place(number)?;
        self.slots.get(index).filter(|slot| slot.0 == used)?.1.as_ref()
    }

    pub fn get_mut(&mut self, number: u64) -> Option<&mut T> {
        let (index, used) = place(number)?;
        self.slots.get_mut(index).filter(|slot| slot.0 == used)?.1.as_mut()
    }

    pub fn remove(&mut self, number: u64) -> Option<T> {
        let (index, used) = place(number)?;
        let slot = self.slots.get_mut(index).filter(|slot| slot.0 == used)?;
        let value = slot.1.take()?;
        self.count -= 1;
        // A place that was used that often is left alone.
        if let Some(used) = slot.0.checked_add(1) {
            slot.0 = used;
            self.free.push(index as u32);
        }
        Some(value)
    }

    pub fn len(&self) -> usize {
        self.count
    }

    /// All, with their numbers.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u64, &mut T)> {
        self.slots.iter_mut().enumerate().filter_map(|(index, (used, slot))| {
            Some(((u64::from(*used) << 32) | (index as u64 + 1), slot.as_mut()?))
        })
    }

    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.slots.iter_mut().filter_map(|(_, slot)| slot.as_mut())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_old_number_finds_nothing() {
        let mut slots = Slots::default();
        let first = slots.insert(|number| number).unwrap();
        assert_eq!((first, slots.get(1)), (1, Some(&1)));
        assert_eq!(slots.remove(first), Some(1));
        let second = slots.insert(|_| 7).unwrap();
        assert_ne!(first, second);
        assert_eq!(slots.remove(first), None);
        assert_eq!((slots.get(first), slots.get(second)), (None, Some(&7)));
        assert_eq!((slots.get(0), slots.get(u64::MAX), slots.len()), (None, None, 1));
    }
}
