// A static Go program: its own resolver, its own poller, raw system calls. gonet CA | gonet serve ADDRESS
package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"
)

func get(client *http.Client, url string) {
	response, err := client.Get(url)
	if err != nil {
		fmt.Println(url, "error", err)
		return
	}
	defer response.Body.Close()
	n, err := io.Copy(io.Discard, response.Body)
	fmt.Println(url, response.StatusCode, n, err)
}

func main() {
	if os.Args[1] == "serve" {
		listener, err := net.Listen("tcp", os.Args[2])
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("ready", listener.Addr())
		http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "go saw %s\n", r.URL.Path)
		}))
	}
	pem, _ := os.ReadFile(os.Args[1])
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, MaxIdleConnsPerHost: 8}}
	for _, url := range []string{"http://origin.test/hello", "https://origin.test/bytes/1000000", "http://[fd77::2]/hello", "https://v6.test/hello"} {
		get(client, url)
	}
	var wait sync.WaitGroup
	var lock sync.Mutex
	total := int64(0)
	for i := 0; i < 50; i++ {
		wait.Add(1)
		go func() {
			defer wait.Done()
			response, err := client.Get("https://origin.test/bytes/25100")
			if err != nil {
				fmt.Println(err)
				return
			}
			n, _ := io.Copy(io.Discard, response.Body)
			response.Body.Close()
			lock.Lock()
			total += n
			lock.Unlock()
		}()
	}
	wait.Wait()
	fmt.Println("fifty at once", total)
	_, err := net.DialTimeout("tcp", "10.77.0.2:9", 5*time.Second)
	fmt.Println(err)
	_, err = net.DialTimeout("tcp", "10.78.0.1:80", 5*time.Second)
	fmt.Println(err)
	_, err = net.DialTimeout("tcp", "10.77.0.99:80", 300*time.Millisecond)
	fmt.Println(err)
	_, err = net.LookupHost("nowhere.test")
	if e, ok := err.(*net.DNSError); ok {
		fmt.Println("lookup", e.Err, e.IsNotFound)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	go func() {
		c, _ := listener.Accept()
		io.Copy(c, c)
		c.Close()
	}()
	c, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Fprint(c, "inside")
	c.(*net.TCPConn).CloseWrite()
	answer, err := io.ReadAll(c)
	fmt.Println(string(answer), err)
	u, err := net.Dial("udp", "10.77.0.2:7007")
	if err != nil {
		fmt.Println(err)
		return
	}
	u.SetDeadline(time.Now().Add(5 * time.Second))
	fmt.Fprint(u, "datagram")
	buffer := make([]byte, 100)
	n, err := u.Read(buffer)
	fmt.Println(string(buffer[:n]), err)
}
