//! An address for the guest's eth0, by netlink; and an option that no library knows.

use socket2::{Domain, Socket, Type};
use std::os::fd::AsFd;

/// `SO_VM_SOCKETS_BUFFER_SIZE`, and its maximum first: the size is cut to it.
pub fn set_buffer(socket: &Socket, bytes: u64) {
    kso_sys::vsock::set_buffer(socket.as_fd(), bytes).unwrap();
}

/// Brings the interface up with an IPv4 address of 24 bits.
pub fn configure(index: u32, address: [u8; 4]) {
    let mut socket = Socket::new(Domain::from(16), Type::RAW, None).unwrap();
    let mut up = vec![32, 0, 0, 0, 16, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    up.extend(index.to_le_bytes());
    up.extend([1, 0, 0, 0, 1, 0, 0, 0]);
    send(&mut socket, &up);
    let mut add = vec![40, 0, 0, 0, 20, 0, 1, 4, 2, 0, 0, 0, 0, 0, 0, 0, 2, 24, 0, 0];
    add.extend(index.to_le_bytes());
    for kind in [2, 1] {
        add.extend([8, 0, kind, 0]);
        add.extend(address);
    }
    send(&mut socket, &add);
}

fn send(socket: &mut Socket, message: &[u8]) {
    assert_eq!(socket.send(message).unwrap(), message.len());
}
