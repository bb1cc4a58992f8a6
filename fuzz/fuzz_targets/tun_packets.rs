//! Packets of a sandbox, each with its length (two bytes) before it: checks, reassembly, and what they carry.
#![no_main]

use libfuzzer_sys::fuzz_target;

/// Makes the checksum of an IPv4 header right, so that what is behind it is reached.
fn mend(packet: &mut [u8]) {
    let Some(first) = packet.first() else { return };
    let length = usize::from(first & 15) * 4;
    if first >> 4 != 4 || length < 20 || packet.len() < length {
        return;
    }
    packet[10..12].fill(0);
    let sum: u32 = packet[..length].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

fuzz_target!(|bytes: &[u8]| {
    let mut bytes = bytes.to_vec();
    let mut at = 0;
    while let Some([high, low]) = bytes.get(at..).and_then(|rest| rest.first_chunk::<2>()) {
        let end = (at + 2 + usize::from(u16::from_be_bytes([*high, *low]))).min(bytes.len());
        // As it is, and behind a virtio-net header.
        mend(&mut bytes[at + 2..end]);
        if let Some(packet) = bytes[at + 2..end].get_mut(10..) {
            mend(packet);
        }
        at = end;
    }
    kso_gateway::fuzz_packet(&bytes);
});
